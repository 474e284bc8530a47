"""What the kernels compute, in plain torch: the definition that every test compares with."""

import math

import torch
from torch import Tensor

from sagellm_ir.runtime.accel.spec import AttentionSpec

__all__ = ["dequantise", "quantise", "reference"]


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Asymmetric 8-bit codes as LMDeploy's `quant_policy=8` stores them.

    Args:
        x: `[..., head_dim]` keys or values.
        dtype: type of scale and zero point.

    Returns:
        uint8 codes like `x`, and `[..., 2]` with (scale, zero): `x ~ (code - zero) * scale`.
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 255).clamp_min(1e-8)
    zero = -low / scale
    codes = (x / scale + zero + 0.5).clamp(0, 255).to(torch.uint8)
    return codes, torch.cat([scale, zero], -1).to(dtype)


def dequantise(codes: Tensor, scale_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that `quantise` stored, `(code - zero) * scale`."""
    scale, zero = scale_zero[..., :1].to(dtype), scale_zero[..., 1:].to(dtype)
    return (codes.to(dtype) - zero) * scale


def reference(
    spec: AttentionSpec,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    q_lens: list[int],
    kv_lens: list[int],
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention of the last `q_lens[i]` tokens of each sequence over its `kv_lens[i]` tokens.

    Shapes as for `PrefixAttention.run`; prefix groups do not change the result, so there are none
    here. A sequence without keys gets zeros.

    Args:
        dtype: precision of the arithmetic, `torch.float32` or `torch.float64`.

    Returns:
        `[sum(q_lens), heads, head_dim]` in `dtype`.
    """
    out = torch.zeros(sum(q_lens), spec.heads, spec.head_dim, dtype=dtype, device=q.device)
    first = 0
    for seq, (new, total) in enumerate(zip(q_lens, kv_lens, strict=True)):
        rows = slice(first, first + new)
        first += new
        if not new or not total:
            continue
        pages = block_table[seq, : math.ceil(total / spec.block_size)].long()
        keys = _gather(spec, k_cache, k_scales, k_scale, pages, dtype)[:total]
        values = _gather(spec, v_cache, v_scales, v_scale, pages, dtype)[:total]
        scores = torch.einsum("qhd,khd->hqk", q[rows].to(dtype), keys) * spec.score_scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        at = torch.arange(total - new, total, device=q.device)[:, None]
        key = torch.arange(total, device=q.device)[None, :]
        seen = key <= at
        if spec.window:
            seen &= key > at - spec.window
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            sink = sinks.to(dtype)[:, None, None].expand(-1, new, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def _gather(
    spec: AttentionSpec,
    cache: Tensor,
    scales: Tensor | None,
    scale: float,
    pages: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """A sequence's keys or values, one for each query head: `[tokens, heads, head_dim]`."""
    found = cache[pages]
    if scales is not None:
        x = dequantise(found, scales[pages], dtype)
    else:
        x = found.to(dtype) * (scale if spec.kv == "fp8" else 1.0)
    return x.flatten(0, 1).repeat_interleave(spec.group, 1)
