"""Random batches with poison around every byte that must not be read, and what the kernels make
of them. The tests use this on the CPU, the benchmark on a GPU; an engine may at start-up."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from sagellm_ir.runtime.accel.attention import PrefixAttention
from sagellm_ir.runtime.accel.forest import SharedPrefix
from sagellm_ir.runtime.accel.reference import quantise, reference
from sagellm_ir.runtime.accel.spec import AttentionSpec

__all__ = ["Batch", "largest_error", "random_batch", "tolerance"]

NO_PAGE = 1 << 30
"""What stands behind the end of a row of the block table."""


@frozen(eq=False)
class Batch:
    """Sequences, their groups, and one layer's tensors, as `PrefixAttention.run` takes them."""

    q_lens: list[int]
    kv_lens: list[int]
    groups: list[SharedPrefix]
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    lengths: Tensor
    """`kv_lens` on the device, int32."""
    extra: dict[str, Any]
    """Scales and sinks, for those specs that have them."""


def random_batch(
    spec: AttentionSpec,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    groups: Sequence[SharedPrefix] = (),
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    poison: bool = True,
) -> Batch:
    """A batch with N(0, 1) queries, keys and values in scattered pages.

    With `poison`, slots of the cache that hold no token are NaN, or have NaN scales, and block
    tables end in `NO_PAGE`.
    """
    torch.manual_seed(seed)
    table, pages = _tables(spec, kv_lens, groups)
    held = torch.full((pages, spec.block_size), not poison)
    if poison:
        for row, length in zip(table, kv_lens, strict=True):
            at = torch.arange(length)
            held[row[at // spec.block_size].long(), at % spec.block_size] = True
    else:
        table[table == NO_PAGE] = 0
    held = held.to(device)
    caches, extra = [], dict[str, Any]()
    for name in ("k_scales", "v_scales"):
        shape = (pages, spec.block_size, spec.kv_heads, spec.head_dim)
        cache = torch.randn(shape, device=device, dtype=torch.bfloat16).to(spec.dtype)
        if spec.kv == "int8":
            cache, extra[name] = quantise(cache, spec.dtype)
            extra[name][~held] = math.nan
        else:
            cache[~held] = math.nan
            cache = cache.to(spec.cache_dtype)
        caches.append(cache)
    if spec.kv == "fp8":
        extra |= {"k_scale": 0.75, "v_scale": 1.5}
    if spec.sinks:
        extra["sinks"] = torch.randn(spec.heads, device=device).to(spec.dtype)
    q = torch.randn(sum(q_lens), spec.heads, spec.head_dim, device=device).to(spec.dtype)
    lengths = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    return Batch(
        [*q_lens], [*kv_lens], [*groups], q, caches[0], caches[1], table.to(device), lengths, extra
    )


def _tables(
    spec: AttentionSpec, kv_lens: Sequence[int], groups: Sequence[SharedPrefix]
) -> tuple[Tensor, int]:
    """Block tables of shuffled pages, shared where groups say so; and the number of pages."""
    counts = [math.ceil(length / spec.block_size) for length in kv_lens]
    table = torch.full((len(counts), max(counts, default=0) + 1), -1, dtype=torch.int64)
    first = 0
    for row, count in enumerate(counts):
        table[row, :count] = torch.arange(first, first + count)
        first += count
    for group in groups:
        span = slice(group.start // spec.block_size, group.stop // spec.block_size)
        table[list(group.rows), span] = table[group.rows[0], span].clone()
    # Only pages that some row has get a place, and one more that nobody has.
    used = torch.unique(table)
    pages = int((used >= 0).sum()) + 1
    places = torch.cat([torch.randperm(pages)[:-1], torch.tensor([NO_PAGE])]).int()
    table = places[torch.searchsorted(used[used >= 0], table).where(table >= 0, -1)]
    return table, pages


def largest_error(attention: PrefixAttention, batch: Batch, *, tile: int = 0) -> float:
    """Run a batch on poisoned outputs and partials; the largest `|x - y| / (1 + |y|)`, `y` the
    reference in float64.

    NaN if anything was left out or read that should not have been. `tile`: see `update`.
    """
    out = torch.full_like(batch.q, math.nan)
    attention.poison()
    attention.update(batch.q_lens, batch.kv_lens, batch.groups, tile=tile)
    attention.schedule(batch.lengths)
    attention.run(
        *(batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.lengths, out),
        **batch.extra,
    )
    table = batch.block_table.where(batch.block_table != NO_PAGE, 0)
    expected = reference(
        *(attention.spec, batch.q, batch.k_cache, batch.v_cache, table),
        *(batch.q_lens, batch.kv_lens),
        **batch.extra,
    )
    error = (out.double() - expected).abs() / (1 + expected.abs())
    return float(error.max()) if len(out) else 0.0


def tolerance(spec: AttentionSpec) -> float:
    """The largest error that rounding explains: of the weights, and of the output."""
    return 2.0**-7 if spec.dtype is torch.bfloat16 else 2.0**-9
