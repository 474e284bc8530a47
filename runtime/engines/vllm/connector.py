"""`PlanConnector`: carries out a step's KV moves inside vLLM's workers, before the forward.

Each tensor-parallel rank moves its own heads; so one list of moves serves all ranks.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.target import DEVICE

__all__ = ["Copy", "PlanConnector", "PlanMoves", "worker_tables"]

STAGED = 2**26
"""Bytes of blocks that are copied at a time between tiers."""


@frozen
class Copy:
    """Copy blocks `src[i]` to `dst[i]`; device blocks in vLLM's numbers."""

    from_tier: str
    to_tier: str
    src: Sequence[int]
    dst: Sequence[int]


class PlanMoves(KVConnectorMetadata):  # type: ignore[misc]  # vLLM has no types
    """The copies of a step, in order."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self.copies = tuple(copies)


class PlanConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """The worker side of `PlanScheduler`, which fills in the metadata itself.

    `kv_connector_extra_config["tiers"]` gives the blocks of each tier besides the device: memory of the
    host, pinned beside a GPU, in which a block is one piece with all its layers. Copies go through
    device memory of at most `STAGED` bytes and are in order with forwards: nothing here waits for
    them, or reads what they bring.
    """

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Take vLLM's KV tensors, one a layer, and make the other tiers beside them."""
        blocks = self._kv_cache_config.num_blocks
        self._layers = [_blocks_first(name, cache, blocks) for name, cache in kv_caches.items()]
        sizes = [layer[0].numel() * layer.itemsize for layer in self._layers]
        self._stops = list(accumulate(sizes, initial=0))
        self._device = self._layers[0].device
        self._pinned = self._device.type != "cpu"
        tiers: dict[str, int] = self._kv_transfer_config.get_from_extra_config("tiers", {})
        self._tiers = {
            name: torch.zeros(count, sum(sizes), dtype=torch.uint8, pin_memory=self._pinned)
            for name, count in tiers.items()
        }

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do the copies of this step; called before its forward."""
        most = max(1, STAGED // self._stops[-1])
        for copy in self._get_connector_metadata().copies:
            # Within a tier what is read may be written, too: all is read first.
            count = max(1, len(copy.src)) if copy.from_tier == copy.to_tier else most
            for at in range(0, len(copy.src), count):
                staged = self._read(copy.from_tier, copy.src[at : at + count])
                self._write(copy.to_tier, copy.dst[at : at + count], staged)

    def _read(self, tier: str, blocks: Sequence[int]) -> Tensor:
        """Blocks of a tier, on the device: (blocks, bytes of all layers)."""
        staged = torch.empty(len(blocks), self._stops[-1], dtype=torch.uint8, device=self._device)
        if tier == DEVICE:
            index = self._index(blocks)
            for layer, part in self._parts(staged):
                part.copy_(layer.index_select(0, index))
        else:
            for at, run in _runs(blocks):
                staged[at].copy_(self._tiers[tier][run], non_blocking=True)
        return staged

    def _write(self, tier: str, blocks: Sequence[int], staged: Tensor) -> None:
        """Undo `_read`."""
        if tier == DEVICE:
            index = self._index(blocks)
            for layer, part in self._parts(staged):
                layer.index_copy_(0, index, part)
        else:
            for at, run in _runs(blocks):
                self._tiers[tier][run].copy_(staged[at], non_blocking=True)

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, pin_memory=self._pinned).to(self._device, non_blocking=True)

    def _parts(self, staged: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each layer, and its part of staged blocks in its own type and shape."""
        for layer, (start, stop) in zip(self._layers, pairwise(self._stops), strict=True):
            yield layer, staged[:, start:stop].view(layer.dtype).view(-1, *layer.shape[1:])

    # Everything is done in `start_load_kv`.

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded layer by layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Nothing is saved layer by layer."""

    def wait_for_save(self) -> None:
        """Nothing is being saved."""

    # The scheduler's side, which `PlanScheduler` does not use.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """No tokens but those of the plan."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plans allocate."""

    def build_connector_meta(self, scheduler_output: Any) -> PlanMoves:
        """No moves but those of the plan."""
        return PlanMoves(())


def _runs(blocks: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Where blocks lie side by side: their places in the list, and in the tier."""
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield slice(start, at), slice(blocks[start], blocks[at - 1] + 1)
            start = at


def worker_tables(worker: Any) -> dict[str, list[int]]:
    """The block tables of the last forward, by vLLM's request id: run this in a worker."""
    batch = worker.model_runner.input_batch
    table = batch.block_table[0]
    # 0.27 has the kernel's blocks in it, which may be smaller: so many of them are one block.
    parts = getattr(table, "blocks_per_kv_block", 1)
    rows = table.block_table.np
    return {
        name: (rows[at, : table.num_blocks_per_row[at] : parts] // parts).tolist()
        for name, at in batch.req_id_to_index.items()
    }


def _blocks_first(name: str, cache: Any, blocks: int) -> Tensor:
    """A layer's cache as a view of (blocks, ...): some attention backends keep K and V apart."""
    if not isinstance(cache, Tensor):
        raise SageIRError(
            Diagnostic(f"layer {name!r} keeps state that is no KV cache; plans cannot move it")
        )
    at = 1 if cache.shape[0] == 2 != blocks else 0
    if cache.shape[at] % blocks:
        raise SageIRError(
            Diagnostic(f"layer {name!r}: no blocks found in a cache of {tuple(cache.shape)}")
        )
    # A kernel's blocks may be smaller than the scheduler's: so many of them are one block here.
    first = cache.movedim(at, 0)
    return first.view(blocks, -1, *first.shape[1:])
