"""`PlanConnector`: carries out a step's KV moves inside vLLM's workers, before the forward.

Each tensor-parallel rank moves its own heads; so one list of moves serves all ranks.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import PrefixGroup
from sagellm_ir.runtime.engines.vllm.copier import BlockCopier, Copy

__all__ = ["PlanConnector", "PlanMoves", "worker_tables"]


class PlanMoves(KVConnectorMetadata):  # type: ignore[misc]  # vLLM has no types
    """The copies of a step, in order; and for `PlanWorker` what rows of its forward share, by vLLM's ids."""

    def __init__(self, copies: Sequence[Copy], groups: Sequence[PrefixGroup] = ()) -> None:
        self.copies = tuple(copies)
        self.groups = tuple(groups)


class PlanConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """The worker side of `PlanScheduler`, which fills in the metadata itself.

    `kv_connector_extra_config["tiers"]` gives the blocks of each tier besides the device.
    """

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Take vLLM's KV tensors, one a layer, and make the other tiers beside them."""
        blocks = self._kv_cache_config.num_blocks
        layers = [_blocks_first(name, cache, blocks) for name, cache in kv_caches.items()]
        tiers: dict[str, int] = self._kv_transfer_config.get_from_extra_config("tiers", {})
        self._copier = BlockCopier(layers, tiers)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the copies of this step; called before its forward."""
        for copy in self._get_connector_metadata().copies:
            self._copier.copy(copy)

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
