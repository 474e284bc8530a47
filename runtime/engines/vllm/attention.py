"""Attention of `runtime.accel` inside vLLM's FlashAttention backend: what decodes share is read once.

`PlanWorker` chooses `PrefixAwareBackend` for a model's layers. It is vLLM's `FlashAttentionBackend` but for
the rows of a forward that have one new token, where they share: those run our kernels, by a `Step`. They
lie before the others in a batch, which vLLM's own kernel attends to. A CUDA graph of decodes holds ours, in
tiles of one height, so that it serves whatever its rows share, or nothing.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from sagellm_ir.lowering.plan import PrefixGroup
from sagellm_ir.runtime.accel import (
    AccelConfig,
    AttentionSpec,
    Gate,
    make_attention,
    shared_prefixes,
)

if TYPE_CHECKING:  # Imports triton.
    from sagellm_ir.runtime.accel.attention import PrefixAttention

__all__ = ["KernelBatches", "PrefixAwareBackend", "Step", "batches_of"]

logger = logging.getLogger(__name__)

USUAL = 8192
"""Tokens of a prefix behind all rows: what the tiles of a CUDA graph are chosen for."""
AGAIN = 4096
"""Tokens by which a batch grows until its pieces are cut anew."""


@frozen(eq=False)
class Step:
    """A forward with our kernels."""

    attention: "PrefixAttention"
    first: str
    """The layer that runs first: it builds the work list of the forward."""
    rows: int
    """Of the batch, so many from its first on."""


class KernelBatches:
    """Tells the kernels of each batch. One for a model on a device.

    Args:
        attention: the kernels.
        first: the name of the layer that runs first.
        sizes: rows of the CUDA graphs that hold decodes.
        rows: where the worker has its requests, by vLLM's id.
    """

    def __init__(
        self,
        attention: "PrefixAttention",
        first: str,
        sizes: Sequence[int],
        rows: Callable[[], Mapping[str, int]],
    ) -> None:
        gate = attention.gate or Gate()
        self._attention, self._first, self._rows = attention, first, rows
        self._tiles = {
            size: gate.tile_rows(attention.spec, [(size, USUAL)])
            for size in sizes
            if 1 < size <= attention.max_batch
        }
        self._last: object = None
        self.groups: Sequence[PrefixGroup] = ()
        """Of the forward to come, by vLLM's ids of requests."""

    def warm_up(self, cache: torch.Tensor) -> None:
        """Compile the kernels for a layer's cache."""
        from sagellm_ir.runtime.accel.warmup import warm_up

        warm_up(self._attention, *keys_and_values(cache))
        self._last = None

    def step(self, batch: Any) -> Step | None:
        """How a forward runs; None: by vLLM's own attention.

        Args:
            batch: vLLM's `CommonAttentionMetadata`. Rows that fill up a CUDA graph have no tokens.
        """
        rows, tile = batch.num_reqs, None
        if batch.max_query_len == 1:
            tile = self._tiles.get(rows)
        else:
            new = np.diff(batch.query_start_loc_cpu[: rows + 1].numpy())
            rows = int((new != 1).argmax())
        total = batch.seq_lens_cpu_upper_bound[:rows].numpy()
        history = (total - 1).tolist() if rows <= self._attention.max_batch else []
        groups = shared_prefixes(self.groups, self._rows(), history)
        if tile is None and not groups:
            return None
        this = rows, tile, groups, int(total.sum()) // AGAIN
        if this != self._last:
            self._attention.update(np.ones(rows, np.int32), total, groups, tile=tile or 0)
            self._last = this
        if tile is None and not self._attention.variant.shared:
            return None
        return Step(self._attention, self._first, rows)


class PrefixAwareBuilder(FlashAttentionMetadataBuilder):  # type: ignore[misc]  # vLLM has no types
    """Adds to the metadata of a forward the `Step` of its rows that our kernels run, and the metadata
    of the others."""

    reorder_batch_threshold = 1
    """Rows of one new token come first."""

    batches: KernelBatches | None = None
    """Set by `PlanWorker` where there are kernels for the model."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decodes of one token a row."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Never: our kernels do what it does, of some rows too, and under CUDA graphs."""
        return False

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """As vLLM's; what only its own kernels need is left out where ours run."""
        common = common_attn_metadata
        step = self.batches.step(common) if self.batches is not None else None
        made = super().build(common_prefix_len, common, fast_build or step is not None)
        made.step, made.others = step, None
        if step is not None and step.rows < common.num_reqs:
            made.others = super().build(common_prefix_len, behind(common, step.rows), fast_build)
        return made


class PrefixAwareImpl(FlashAttentionImpl):  # type: ignore[misc]
    """One layer's attention: ours for rows of a `Step`, else vLLM's."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As vLLM's `AttentionImpl.forward`."""
        step: Step | None = getattr(attn_metadata, "step", None)
        if step is None:
            given = query, key, value, kv_cache, attn_metadata, output
            super().forward(layer, *given, *args, **kwargs)
            return output
        first, others, lengths = step.rows, attn_metadata.others, attn_metadata.seq_lens
        if layer.layer_name == step.first:
            step.attention.schedule(lengths)
        pages = *keys_and_values(kv_cache), attn_metadata.block_table
        step.attention.run(query[:first], *pages, lengths, output[:first])
        if others is not None:
            given = query[first:], key[first:], value[first:], kv_cache, others, output[first:]
            super().forward(layer, *given, *args, **kwargs)
        return output


class PrefixAwareBackend(FlashAttentionBackend):  # type: ignore[misc]
    """vLLM's FlashAttention, with our kernels for decodes."""

    @staticmethod
    def get_name() -> str:
        """The place that vLLM keeps for others' backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PrefixAwareImpl]:
        """See the module."""
        return PrefixAwareImpl

    @staticmethod
    def get_builder_cls() -> type[PrefixAwareBuilder]:
        """See the module."""
        return PrefixAwareBuilder


PER_ROW = (
    *("seq_lens", "seq_lens_cpu_upper_bound", "block_table_tensor", "is_prefilling"),
    *("_seq_lens_cpu", "_num_computed_tokens_cpu"),
)
"""Fields of vLLM's `CommonAttentionMetadata` that have an entry a row, in one release or another."""


def behind(common: Any, first: int) -> Any:
    """vLLM's description of a batch without its first rows, of one token each."""
    rows = {
        name: found[first:]
        for name in PER_ROW
        if (found := getattr(common, name, None)) is not None
    }
    return replace(
        common,
        query_start_loc=common.query_start_loc[first:] - first,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - first,
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - first,
        slot_mapping=common.slot_mapping[first:],
        **rows,
    )


def keys_and_values(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's cache, `[blocks, kv_heads, block_size, 2 * head_dim]`, as two views of
    `[blocks, block_size, kv_heads, head_dim]`."""
    keys, values = cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values


def batches_of(
    config: AccelConfig,
    layers: Mapping[str, Any],
    *,
    block_size: int,
    dtype: torch.dtype,
    max_batch: int,
    sizes: Sequence[int],
    rows: Callable[[], Mapping[str, int]],
    device: torch.device | str,
) -> KernelBatches | None:
    """The kernels for a model; None, with one log line, when they cannot serve it.

    Args:
        config: see `AccelConfig`.
        layers: the model's attention, by name, in the order in which it runs.
        block_size: tokens of a block.
        dtype: of activations and of the cache.
        max_batch: rows of a forward.
        sizes: see `KernelBatches`; so are `rows`.
        device: where the cache is.
    """
    specs = {spec_of(layer.impl, block_size, dtype) for layer in layers.values()}
    if len(specs) != 1 or (spec := next(iter(specs))) is None:
        reason = "its layers differ" if len(specs) > 1 else "it has no attention that they can be"
        logger.warning("prefix-aware attention is off, vLLM's own kernels run: %s", reason)
        return None
    batch = min(max_batch, 4096)
    attention = make_attention(config, spec, max_batch=batch, max_rows=batch, device=device)
    if attention is None:
        return None
    return KernelBatches(attention, next(iter(layers)), sizes, rows)


def spec_of(impl: Any, block_size: int, dtype: torch.dtype) -> AttentionSpec | None:
    """What a layer's attention computes; None for what our kernels have no words for."""
    plain = isinstance(impl, PrefixAwareImpl) and impl.alibi_slopes is None and impl.sinks is None
    if not plain or impl.attn_type != "decoder" or impl.kv_cache_dtype not in NATIVE[dtype]:
        return None
    return AttentionSpec(
        impl.num_heads,
        impl.num_kv_heads,
        impl.head_size,
        block_size,
        dtype=dtype,
        scale=impl.scale,
        window=impl.sliding_window[0] + 1,
        softcap=float(impl.logits_soft_cap),
    )


NATIVE = {torch.bfloat16: ("auto", "bfloat16"), torch.float16: ("auto", "float16")}
"""vLLM's `cache_dtype` for a cache of a type."""
