"""`warm_up`: compiles what an engine will launch, before its first request waits for that."""

import logging
import math
import time
from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from sagellm_ir.runtime.accel.attention import PrefixAttention
from sagellm_ir.runtime.accel.forest import SharedPrefix
from sagellm_ir.runtime.accel.gate import Fixed
from sagellm_ir.runtime.accel.launch import rows_of_merge
from sagellm_ir.runtime.accel.spec import AttentionSpec
from sagellm_ir.runtime.accel.tiles import tile_heights

__all__ = ["warm_up"]

_LOG = logging.getLogger(__name__)
_WIDTHS = (16, 17)
"""Triton compiles once for strides that 16 divides, and once for others."""


def warm_up(
    attention: PrefixAttention,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Run every kernel of an attention once; the batch it knows has to be given again by `update`.

    Compiled kernels stay in Triton's cache on disk, so that this takes seconds only at the first start
    on a machine.

    Args:
        attention: the kernels.
        k_cache: one layer's, as for `PrefixAttention.run`; page 0 is read, nothing is written.
        v_cache: like `k_cache`.
        k_scales: for `int8`.
        v_scales: like `k_scales`.
    """
    begun = time.monotonic()
    spec, device = attention.spec, attention.device
    gate = attention.gate
    sinks = torch.zeros(spec.heads, dtype=spec.dtype, device=device) if spec.sinks else None
    try:
        for new, shared in _batches(spec, attention.max_batch, attention.max_rows):
            total = [spec.block_size + tokens for tokens in new]
            group = SharedPrefix(0, spec.block_size, range(len(new)))
            attention.gate = _Only(rows=shared)
            attention.update(new, total, [group] if shared else [])
            q = torch.zeros(sum(new), spec.heads, spec.head_dim, dtype=spec.dtype, device=device)
            lengths = torch.tensor(total, dtype=torch.int32, device=device)
            attention.schedule(lengths)
            pages = -(-max(total) // spec.block_size)
            for width in _WIDTHS:
                width += -(-pages // 16) * 16
                table = torch.zeros(len(new), width, dtype=torch.int32, device=device)
                attention.run(
                    *(q, k_cache, v_cache, table, lengths, torch.empty_like(q)),
                    k_scales=k_scales,
                    v_scales=v_scales,
                    sinks=sinks,
                )
    finally:
        attention.gate = gate
    _LOG.info("attention kernels are compiled, %.1f s", time.monotonic() - begun)


@frozen
class _Only(Fixed):
    """Packs all groups."""

    def saved(self, *_: object) -> float:
        return math.inf


def _batches(spec: AttentionSpec, batch: int, rows: int) -> Iterator[tuple[list[int], int]]:
    """New tokens of each sequence, and the height of the tiles for a page that they share (0: none):
    together they need every tile of both kernels, beside each other or after each other, and every
    form of `schedule` and `merge`."""
    heights = tile_heights(spec)
    for height in heights:
        many, tokens = max(2, height // spec.group), max(1, height // spec.group)
        for new in ([1] * many, [1] * (many // 16 * 16 or 16), [tokens] * 2):
            if len(new) <= batch and sum(new) <= rows:
                yield from ((new, shared) for shared in heights)
        for new in ([tokens], [tokens] * 2, [tokens] * 16):
            if len(new) <= batch and sum(new) <= rows:
                yield new, 0
    for more in rows_of_merge(spec):
        if 1 < more <= rows and batch > 1:
            yield [more], 0
            yield [more - 1, 1], heights[0]
