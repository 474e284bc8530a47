"""`Tensors`: what a caller hands in for one layer, checked."""

import torch
from attrs import frozen
from torch import Tensor

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.accel.spec import AttentionSpec

__all__ = ["Tensors"]


@frozen(eq=False)
class Tensors:
    """One layer's tensors, as documented at `PrefixAttention.run`."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    kv_lens: Tensor
    out: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    sinks: Tensor | None
    qk_scale: float
    """Score factor, times log2(e)."""
    out_scale: float

    def check(self, spec: AttentionSpec, rows: int, batch: int) -> None:
        """Raise `SageIRError` for a tensor of the wrong shape, type or strides."""
        page = (spec.block_size, spec.kv_heads, spec.head_dim)
        query = (rows, spec.heads, spec.head_dim)
        scales = spec.kv == "int8"
        wanted: list[tuple[str, Tensor | None, tuple[int | None, ...] | None, torch.dtype]] = [
            ("q", self.q, query, spec.dtype),
            ("out", self.out, query, spec.dtype),
            ("k_cache", self.k, (None, *page), spec.cache_dtype),
            ("v_cache", self.v, (None, *page), spec.cache_dtype),
            ("block_table", self.table, (None, None), torch.int32),
            ("kv_lens", self.kv_lens, (None,), torch.int32),
            ("k_scales", self.k_scales, (None, *page[:2], 2) if scales else None, spec.dtype),
            ("v_scales", self.v_scales, (None, *page[:2], 2) if scales else None, spec.dtype),
        ]
        for name, tensor, shape, dtype in wanted:
            _check(name, tensor, shape, dtype)
        if (self.sinks is not None) != spec.sinks:
            problem = "sinks are given iff the spec has them"
        elif self.sinks is not None and self.sinks.shape != (spec.heads,):
            problem = f"sinks: expected shape ({spec.heads},), got {tuple(self.sinks.shape)}"
        elif min(len(self.table), len(self.kv_lens)) < batch:
            problem = f"block_table and kv_lens must have a row for each of {batch} sequences"
        else:
            return
        raise SageIRError(Diagnostic(f"attention: {problem}"))


def _check(
    name: str, tensor: Tensor | None, shape: tuple[int | None, ...] | None, dtype: torch.dtype
) -> None:
    """Raise unless a tensor has a shape (None: any), a type and a contiguous last dimension."""
    if shape is None:
        if tensor is None:
            return
        problem = "only an int8 cache has it"
    elif tensor is None:
        problem = "an int8 cache needs it"
    elif tensor.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        problem = f"expected shape {shape}, got {tuple(tensor.shape)}"
    elif tensor.dtype != dtype:
        problem = f"expected {dtype}, got {tensor.dtype}"
    elif tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        problem = f"its last dimension must be contiguous, its stride is {tensor.stride(-1)}"
    else:
        return
    raise SageIRError(Diagnostic(f"attention: {name}: {problem}"))
