"""Prefix-aware attention in LMDeploy's CUDA backend.

`install`, before a model is built, puts two wrappers in place:

- `PrefixAwareAttention` around each layer's attention: what a batch shares is read once, and rows
  with history are read from their pages, without `flatten_kv_cache`;
- `prefix_aware(CUDAGraphRunner)`: tells the kernels of each new batch before its first forward, and
  keeps CUDA graphs apart by the kernels that they hold.

A forward for which ours have no advantage (nothing shared in a decode, little history in a prefill), or
for which they are not made, runs LMDeploy's own. `AccelConfig` chooses; see `make_attention`.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray

from sagellm_ir.runtime.accel import AccelConfig, AttentionSpec, SharedPrefix, make_attention
from sagellm_ir.runtime.accel.tiles import tile_for
from sagellm_ir.runtime.engines.lmdeploy.rows import BatchRows

if TYPE_CHECKING:  # Imports triton.
    from sagellm_ir.runtime.accel.attention import PrefixAttention, Variant

__all__ = ["KernelBatches", "PrefixAwareAttention", "install", "prefix_aware"]

logger = logging.getLogger(__name__)

LONG_HISTORY = 32
"""Cached tokens for each new one of a prefill from which on reading pages beats copying them first:
measured on an H100, where at fewer LMDeploy's own prefill is the faster (docs/kernels.md)."""
MANY = 2048
"""New tokens of a prefill, and keys that each of them sees on average, from which on tiles that take whole
SMs are worth what they cost the host: 1.5 times the speed of LMDeploy's prefill on an H200."""

KV_FORMATS = {0: "native", 8: "int8"}
"""Of LMDeploy's `quant_policy`."""


@frozen(eq=False)
class Step:
    """One forward with our kernels: takes the place of `BatchRows` in the attention metadata."""

    attention: "PrefixAttention"
    variant: "Variant"
    first: "PrefixAwareAttention"
    """The layer that runs first: it builds the work list of the forward."""
    kv_lens: torch.Tensor | None
    """int32 `[rows]`; None: the metadata's own, a buffer of the CUDA graph."""


class PrefixAwareAttention:
    """One layer's attention: ours for forwards with a `Step`, else the wrapped one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet: unpickling, copying
            raise AttributeError(name)
        return getattr(self.inner, name)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        attn_metadata: Any,
        k_scales_zeros: torch.Tensor | None = None,
        v_scales_zeros: torch.Tensor | None = None,
        learnable_sink: torch.Tensor | None = None,
        inplace: bool = True,
    ) -> torch.Tensor:
        """As LMDeploy's `AttentionImpl.forward`."""
        meta, scales = attn_metadata, (k_scales_zeros, v_scales_zeros)
        step = meta.prefix_groups
        if not isinstance(step, Step):
            inner: torch.Tensor = self.inner.forward(
                *(query, key, value, k_cache, v_cache, meta, *scales),
                learnable_sink=learnable_sink,
                inplace=inplace,
            )
            return inner
        new_tokens = query.numel() // (query.size(-1) * query.size(-2))
        self.inner.fill_kv_cache(
            *(key, value, k_cache, v_cache, meta.q_start_loc, meta.q_seqlens),
            kv_seq_length=meta.kv_seqlens,
            max_q_seq_length=1 if meta.is_decoding else new_tokens,
            block_offsets=meta.block_offsets,
            k_scales_zeros=k_scales_zeros,
            v_scales_zeros=v_scales_zeros,
            quant_policy=meta.quant_policy,
        )
        kv_lens = meta.kv_seqlens if step.kv_lens is None else step.kv_lens
        if self is step.first:
            step.attention.schedule(kv_lens)
        out = torch.empty_like(query)
        return step.attention.run(
            *(query, k_cache, v_cache, meta.block_offsets, kv_lens, out),
            k_scales=k_scales_zeros,
            v_scales=v_scales_zeros,
            sinks=learnable_sink,
        )


class KernelBatches:
    """Tells the kernels of each batch. One for a model on a device."""

    def __init__(self, attention: "PrefixAttention", first: PrefixAwareAttention) -> None:
        self.attention = attention
        self._first = first
        self._last: tuple[Any, int] = (None, 0)
        self._warm = False

    def warm_up(self, caches: Sequence[torch.Tensor]) -> None:
        """Compile the kernels for a layer's caches: keys, values and, if quantised, their scales."""
        if not self._warm:
            from sagellm_ir.runtime.accel.warmup import warm_up

            warm_up(self.attention, *caches)
            self._warm = True

    def prepare(self, meta: Any, rows: int | None) -> None:
        """Put a `Step` into the metadata of a forward, or None where LMDeploy's own kernels run.

        Args:
            meta: LMDeploy's attention metadata of the forward.
            rows: those of the CUDA graph; None: the forward runs without one.
        """
        batch, meta.prefix_groups = meta.prefix_groups, None
        if not isinstance(batch, BatchRows) or len(batch.new) != len(meta.q_seqlens):
            return
        new, total = batch.padded(rows or len(batch.new))
        if self._last != (batch, len(new)):  # a decode of many forwards is one batch
            groups = [SharedPrefix(*group) for group in batch.readable()]
            self.attention.update(new, total, groups)
            self._last = (batch, len(new))
        wide = tile_for(self.attention.spec, self.attention.variant.private).wide
        gains = not meta.is_decoding and prefill_gains(new, total, wide)
        if self.attention.variant.shared or gains:
            lens = None if rows else meta.kv_seqlens.to(torch.int32)
            meta.prefix_groups = Step(self.attention, self.attention.variant, self._first, lens)


def prefill_gains(new: NDArray[np.int32], total: NDArray[np.int32], wide: bool) -> bool:
    """Whether our kernels are the faster for a prefill.

    Args:
        new: `[rows]` tokens to compute.
        total: `[rows]` tokens, those included.
        wide: whether they run as tiles that take whole SMs.
    """
    tokens = int(new.sum())
    if total.sum() > LONG_HISTORY * tokens:
        return True
    keys = (new * (total - (new - 1) / 2)).sum()
    return wide and tokens >= MANY and bool(keys >= MANY * tokens)


def prefix_aware(runner: type[Any], config: AccelConfig) -> type[Any]:
    """LMDeploy's `CUDAGraphRunner`, with the kernels told of each batch."""

    class PrefixAwareGraphRunner(runner):  # type: ignore[misc]
        """See the module."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._steps = steps_of(self, config)

        def __call__(self, **kwargs: Any) -> Any:
            meta = kwargs.get("attn_metadata")
            if self._steps is not None and meta is not None:
                self._steps.warm_up(kwargs["past_key_values"][0])  # LMDeploy's own warm-up is first
                graph = self.enable_graph(**kwargs)
                rows = self._get_capture_tokens(len(meta.q_seqlens)) if graph else None
                self._steps.prepare(meta, rows)
            return super().__call__(**kwargs)

        def get_graph_key(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            """LMDeploy's key, and our kernels."""
            key: tuple[Any, ...] = super().get_graph_key(*args, **kwargs)
            step = kwargs["attn_metadata"].prefix_groups
            return (*key, step.variant) if isinstance(step, Step) else key

    return PrefixAwareGraphRunner


def steps_of(runner: Any, config: AccelConfig) -> KernelBatches | None:
    """The kernels for a runner's model; None, with one log line, when they cannot serve it."""
    found = [getattr(module, "impl", None) for module in runner.model.modules()]
    layers = [impl for impl in found if isinstance(impl, PrefixAwareAttention)]
    cache, model = runner.cache_config, runner.model_config
    specs = {spec_of(layer.inner, cache, model.dtype) for layer in layers}
    if len(specs) != 1 or (spec := next(iter(specs))) is None:
        reason = "its layers differ" if len(specs) > 1 else "it has no attention that they can be"
        logger.warning("prefix-aware attention is off, LMDeploy's own kernels run: %s", reason)
        return None
    attention = make_attention(
        config,
        spec,
        max_batch=cache.max_batches,
        max_rows=max(cache.max_prefill_token_num, cache.max_batches),
        device=runner.device,
    )
    return None if attention is None else KernelBatches(attention, layers[0])


def spec_of(inner: Any, cache: Any, dtype: torch.dtype) -> AttentionSpec | None:
    """What a layer's attention computes; None for what our kernels have no words for."""
    same_width = inner.v_head_size == inner.head_size
    if not same_width or cache.quant_policy not in KV_FORMATS:
        return None
    window = inner.sliding_window
    window = window[0] if isinstance(window, tuple) else window
    return AttentionSpec(
        inner.num_heads,
        inner.num_kv_heads,
        inner.head_size,
        cache.block_size,
        dtype=dtype,
        kv=KV_FORMATS[cache.quant_policy],
        scale=inner.scale,
        window=0 if window is None or window < 0 else window + 1,
        softcap=max(inner.logit_softcapping or 0.0, 0.0),
    )


def install(config: AccelConfig) -> Callable[[], None]:
    """Put the wrappers into LMDeploy's CUDA backend of this process; the result takes them out.

    Models that were built before keep LMDeploy's kernels.
    """
    from lmdeploy.pytorch.backends.cuda import attention, graph_runner

    builder, runner = attention.TritonAttentionBuilder, graph_runner.CUDAGraphRunner
    stock = builder.build

    def build(*args: Any, **kwargs: Any) -> Any:
        inner = stock(*args, **kwargs)
        plain = not (inner.alibi or kwargs.get("use_flash_mla") or kwargs.get("learnable_sink"))
        plain = plain and inner.causal and kwargs.get("block_sparse_size", 1) == 1
        return PrefixAwareAttention(inner) if plain else inner

    def uninstall() -> None:
        builder.build = staticmethod(stock)
        graph_runner.CUDAGraphRunner = runner

    if config.mode != "off":
        builder.build = staticmethod(build)
        graph_runner.CUDAGraphRunner = prefix_aware(runner, config)
    return uninstall
