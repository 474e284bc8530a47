"""The blocks that a plan names, and the logical blocks of LMDeploy that stand for them."""

from typing import Any

import numpy as np

from sagellm_ir.lowering.plan import Bind, KVMove, PlanStep
from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager
from sagellm_ir.target import DEVICE, HOST

__all__ = ["PlanBlocks"]


class PlanBlocks:
    """Carries out a plan's moves and frees on what LMDeploy allocated for its binds."""

    def __init__(self, kv: KVManager) -> None:
        self.kv = kv
        self._own: dict[str, dict[int, int]] = {DEVICE: {}, HOST: {}}
        """LMDeploy's logical block by tier and the plan's block."""
        self._bound: list[tuple[Bind, Any]] = []
        """Binds that were not looked at, and their sequences."""

    def bind(self, bind: Bind, seq: Any) -> None:
        """Have the blocks of a bind stand for those of a sequence, which has got them."""
        self._bound.append((bind, seq))

    def settle(self) -> None:
        """Look at what was bound. To be called between two decisions, so that the next need not."""
        own = self._own[DEVICE]
        for bind, seq in self._bound:
            table = seq.logical_blocks
            if bind.at < table._num_real:
                blocks = table.get_real_blocks()[bind.at : bind.at + len(bind.blocks)]
                own.update(zip(bind.blocks, blocks.tolist(), strict=False))
        self._bound.clear()

    def move(self, step: PlanStep) -> None:
        """Do a step's moves. What it frees becomes the first victim: LMDeploy frees when it must.

        Blocks that are gone are left out. No forward may be in flight.
        """
        self.settle()
        for item in step.kv:
            if isinstance(item, KVMove):
                self._move(item)
                continue
            known = self._own[item.tier]
            freed = [known.pop(block) for block in item.blocks if block in known]
            self.kv.expendable.update(freed)

    def _move(self, move: KVMove) -> None:
        known = self._own[move.from_tier]
        pairs = [
            (known.pop(src), dst)
            for src, dst in zip(move.src, move.dst, strict=True)
            if src in known
        ]
        self._own[move.to_tier].update({dst: own for own, dst in pairs})
        held = [own for own, _ in pairs if self._is_held(own)]
        if move.to_tier != DEVICE:
            self.kv.spill(held)
        elif self.kv.make_room(len(held)):
            self.kv.restore(held)

    def _is_held(self, block: int) -> bool:
        return bool(self.kv.blocks.allocator.get_ref_count(np.array([block]))[0] > 0)
