"""The few kernels that decide speed, each with a plain torch fallback.

On a CPU, oneDNN's linear (`torch.ops.mkldnn._linear_pointwise`, what torch's own compiler emits) is
about twice as fast in float32 as the BLAS behind `F.linear`, and takes SiLU, product and sum along.
Weights that are laid out for it beforehand (`pack`) are not laid out again in each call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "linear", "linear_add", "linear_mul", "linear_silu", "pack", "rotate"]


def _onednn(name: str) -> Any:
    """An overload of oneDNN's linear, or None when this torch build has none."""
    try:
        return getattr(torch.ops.mkldnn._linear_pointwise, name)
    except (AttributeError, RuntimeError):
        return None


_UNARY = _onednn("default")
_BINARY = _onednn("binary")
_FUSED_TYPES = (torch.float32, torch.bfloat16)
_PACK_ROWS = 64
"""Rows of a product that weights are laid out for. Measured in float32 on 2 cores of an AMD EPYC:
1.1 to 1.2 times as fast with 64 rows, 1.5 with 16; as fast as before with 1 and with 2048."""


def _fused(x: Tensor) -> bool:
    return _BINARY is not None and x.device.type == "cpu" and x.dtype in _FUSED_TYPES


def pack(weight: Tensor) -> Tensor:
    """A weight as the products below like it best. What comes back is good for nothing else."""
    if not _fused(weight):
        return weight
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
    except (AttributeError, RuntimeError):
        return weight
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`."""
    if _fused(x):
        out: Tensor = _UNARY(x, weight, bias, "none", [], None)
        return out
    return F.linear(x, weight, bias)


def linear_silu(x: Tensor, weight: Tensor) -> Tensor:
    """`silu(x @ weight.T)`."""
    if _fused(x):
        out: Tensor = _UNARY(x, weight, None, "swish", [], None)
        return out
    return F.silu(F.linear(x, weight))


def linear_mul(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """`(x @ weight.T) * other`."""
    if _fused(x):
        out: Tensor = _BINARY(x, other, weight, None, "mul")
        return out
    return F.linear(x, weight) * other


def linear_add(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """`x @ weight.T + other`."""
    if _fused(x):
        out: Tensor = _BINARY(x, other, weight, None, "add")
        return out
    return F.linear(x, weight) + other


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of `x` (tokens, heads, head_dim), neighbouring pairs as complex numbers.

    `turn` is (tokens, 1, head_dim / 2), complex64.
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores, by which partial results are merged.

    Args:
        query: (batch, heads, rows, head_dim).
        key: (batch, kv_heads, columns, head_dim); head h reads KV head `h // (heads / kv_heads)`.
        value: as `key`.
        causal: row i sees columns 0 to i.
        mask: added to the scores; broadcasts to (batch, heads, rows, columns).

    Returns:
        (batch, heads, rows, head_dim) in the query's dtype; (batch, heads, rows) in float32.
    """
    if query.device.type == "cpu":
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask
        )
        return out, total
    return attend_plain(query, key, value, causal, mask)


def attend_plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attend` in elementary operations, scores in float32: any device."""
    heads = (query.shape[0], key.shape[1], -1, *query.shape[2:])
    scores = query.reshape(heads).float() @ key.unsqueeze(2).float().transpose(-1, -2)
    scores = scores.flatten(1, 2) * query.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    if mask is not None:
        scores = scores + mask
    total = scores.logsumexp(-1)
    weights = (scores - total[..., None]).exp().unflatten(1, (key.shape[1], -1))
    return (weights @ value.unsqueeze(2).float()).flatten(1, 2).to(query.dtype), total
