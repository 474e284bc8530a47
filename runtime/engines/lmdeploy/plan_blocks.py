"""The blocks that a plan names, and the logical blocks of LMDeploy that stand for them."""

from typing import Any

import numpy as np

from sagellm_ir.lowering.plan import Bind, KVMove, PlanStep
from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager
from sagellm_ir.target import DEVICE

__all__ = ["PlanBlocks"]


class PlanBlocks:
    """Carries out a plan's moves and frees on what LMDeploy allocated for its binds."""

    def __init__(self, kv: KVManager) -> None:
        self.kv = kv
        self._own: dict[tuple[str, int], int] = {}
        """LMDeploy's logical block by tier and the plan's block."""

    def bind(self, bind: Bind, seq: Any) -> None:
        """Remember what stands for the blocks of a bind, after the sequence got its blocks."""
        table = [] if seq is None else seq.logical_blocks.get_real_blocks()[bind.at :].tolist()
        self._own.update({(DEVICE, b): own for b, own in zip(bind.blocks, table, strict=False)})

    def move(self, step: PlanStep) -> None:
        """Do a step's moves. What it frees becomes the first victim: LMDeploy frees when it must.

        Blocks that are gone are left out. No forward may be in flight.
        """
        for item in step.kv:
            if isinstance(item, KVMove):
                self._move(item)
                continue
            own = (self._own.pop((item.tier, block), None) for block in item.blocks)
            self.kv.expendable.update(block for block in own if block is not None)

    def _move(self, move: KVMove) -> None:
        pairs = [
            (self._own.pop((move.from_tier, src)), dst)
            for src, dst in zip(move.src, move.dst, strict=True)
            if (move.from_tier, src) in self._own
        ]
        self._own.update({(move.to_tier, dst): own for own, dst in pairs})
        held = [own for own, _ in pairs if self._is_held(own)]
        if move.to_tier != DEVICE:
            self.kv.spill(held)
        elif self.kv.make_room(len(held)):
            self.kv.restore(held)

    def _is_held(self, block: int) -> bool:
        return bool(self.kv.blocks.allocator.get_ref_count(np.array([block]))[0] > 0)
