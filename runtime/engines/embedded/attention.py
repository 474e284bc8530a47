"""Paged attention: which KV each row reads, as few zero-copy calls as possible.

`plan_parts` looks at block tables once a forward; `paged_attention` then runs in every layer. Rows
that need several parts merge them by log-sum-exp (as in FlashDecoding and Cascade inference), so a
prefix that many rows share is read once for all of them.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from torch import Tensor

from sagellm_ir.runtime.engines.embedded.ops import attend
from sagellm_ir.runtime.engines.embedded.pages import Pages
from sagellm_ir.runtime.engines.embedded.pool import BlockTable, Span

__all__ = ["Part", "Row", "SharedSpan", "paged_attention", "plan_parts"]

Rows = slice | Tensor

VIEW_TOKENS = 256
"""Below this many tokens a copy into one batch is cheaper than an attention call of its own
(measured: a call costs about 25 us a layer, a copied token about 0.1 us)."""
SHARE_TOKENS = 1024
"""Tokens that sharing a prefix must save in a forward to pay for the merge of its result."""
TILE_ROWS = 128
"""A long chunk's own attention runs in tiles of this many rows on a CPU, whose kernel computes most
of the hidden upper triangle (measured: 512 tokens take 0.8 of the time; nothing is lost beyond)."""
MAX_WASTE = 2
"""Rows of one call may be this many times shorter than its longest."""


@frozen
class Row:
    """Consecutive new tokens of one request in the batch."""

    first: int
    """Index of its first token in the batch."""
    count: int
    context: int
    """Tokens read from the pool: `[0, context)`. A decode row's own token is one of them; a
    prefill chunk reads its own tokens from the forward instead."""
    table: BlockTable
    decode: bool


@frozen
class SharedSpan:
    """Rows (by index) whose tables agree on tokens `[start, stop)`."""

    start: int
    stop: int
    rows: tuple[int, ...]


@frozen
class Part:
    """One attention call: batch rows, and the KV they read."""

    rows: Rows
    fresh: slice | None = None
    """Batch rows whose KV they read from the forward instead of the pool."""
    causal: bool = False
    """Row i reads columns 0 to i only."""
    shared: bool = False
    """All rows read one KV; else row i reads KV i."""
    spans: tuple[int, int, int, int] | None = None
    """`(slot, stride, number, length)`: equally spaced spans, read in place."""
    index: Tensor | None = None
    """(number, length) slots to copy together, when they do not lie side by side."""
    mask: Tensor | None = None
    """Added to the scores: hides what is behind a shorter row's end, or later than a tile's row."""
    first: bool = False
    """No part before this one wrote these rows."""

    def keys_values(self, pages: Pages) -> Tensor:
        """(2, number, kv_heads, length, head_dim) out of a layer's pages."""
        if self.spans is not None:
            return pages.spans(*self.spans)
        assert self.index is not None
        return pages.take(self.index)


def plan_parts(
    rows: Sequence[Row], shared: Sequence[SharedSpan], slots: int, device: torch.device
) -> tuple[Part, ...]:
    """The attention calls of a forward, in an order in which each part may merge into earlier ones.

    Args:
        rows: in batch order.
        shared: prefix groups; those that save too little are read row by row.
        slots: size of the device tier in tokens.
        device: where index tensors go.
    """
    planner = _Planner(slots, device)
    gaps: list[list[tuple[int, int]]] = [[(0, row.context)] for row in rows]
    for row in rows:
        if not row.decode:
            planner.add_chunk(row)
    for group in shared:
        members = [rows[i] for i in group.rows]
        tokens = sum(row.count for row in members)
        if (tokens - 1) * (group.stop - group.start) < SHARE_TOKENS or len(members) < 2:
            continue
        batch = [t for row in members for t in range(row.first, row.first + row.count)]
        planner.add_shared(batch, members[0].table.spans(group.start, group.stop))
        for i in group.rows:
            gaps[i] = _cut(gaps[i], group.start, group.stop)
    each: list[tuple[int, int, int]] = []
    for row, spans in zip(rows, gaps, strict=True):
        found = [span for low, high in spans for span in row.table.spans(low, high)]
        if row.decode:
            each += [(slot, length, row.first) for slot, length in found]
        elif found:
            planner.add_shared(range(row.first, row.first + row.count), found)
    planner.add_each(each)
    return tuple(planner.parts)


def _cut(gaps: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Take `[start, stop)` out of intervals."""
    pieces = ((low, min(high, start)) for low, high in gaps)
    others = ((max(low, stop), high) for low, high in gaps)
    return [(low, high) for low, high in sorted((*pieces, *others)) if low < high]


class _Planner:
    """Collects parts, and knows which batch rows have a result already."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.parts: list[Part] = []
        self._slots = slots
        self._device = device
        self._seen: set[int] = set()

    def add(self, part: Part) -> None:
        rows = part.rows
        listed = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        first = self._seen.isdisjoint(listed)
        self._seen.update(listed)
        self.parts.append(evolve(part, first=first))

    def add_chunk(self, row: Row) -> None:
        """A chunk's tokens read each other. The first tile takes what is over."""
        stop = row.first + row.count
        tile = TILE_ROWS if self._device.type == "cpu" else row.count
        edge = row.first + (row.count - 1) % tile + 1
        rows = slice(row.first, edge)
        self.add(Part(rows, fresh=rows, causal=True))
        mask = torch.zeros(tile, row.count if edge < stop else 0)
        if edge < stop:
            future = torch.ones(tile, tile, dtype=torch.bool).triu(1)
            mask[:, -tile:].masked_fill_(future, float("-inf"))
        for low in range(edge, stop, tile):
            fresh = slice(row.first, low + tile)
            columns = mask[:, row.count - (low + tile - row.first) :]
            self.add(Part(slice(low, low + tile), fresh=fresh, mask=columns))

    def add_shared(self, batch: Sequence[int], spans: Iterable[Span]) -> None:
        """All batch rows read all the spans: long ones in place, short ones copied together."""
        rows, short = self._rows(batch), []
        for slot, length in spans:
            if length >= VIEW_TOKENS:
                self.add(Part(rows, shared=True, spans=(slot, 0, 1, length)))
            else:
                short.append((slot, length))
        if len(short) == 1:
            self.add(Part(rows, shared=True, spans=(short[0][0], 0, 1, short[0][1])))
        elif short:
            self.add(Part(rows, shared=True, index=self._index([short])[0]))

    def add_each(self, units: list[tuple[int, int, int]]) -> None:
        """Decode rows read their own spans `(slot, length, row)`.

        Equally spaced spans of similar length become one call without a copy; two always are.
        """
        short: dict[int, list[Span]] = {}
        for batch in self._batches(sorted(units)):
            length = max(unit[1] for unit in batch)
            if len(batch) * length < VIEW_TOKENS and len(units) > len(batch):
                for slot, size, row in batch:
                    short.setdefault(row, []).append((slot, size))
                continue
            stride = batch[1][0] - batch[0][0] if len(batch) > 1 else 0
            rows = self._rows([row for _, _, row in batch])
            mask = self._mask([size for _, size, _ in batch])
            self.add(Part(rows, spans=(batch[0][0], stride, len(batch), length), mask=mask))
        if short:
            index, mask = self._index(list(short.values()))
            self.add(Part(self._rows(list(short)), index=index, mask=mask))

    def _batches(self, units: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
        batches: list[list[tuple[int, int, int]]] = []
        for unit in units:
            if batches and self._fits(batches[-1], unit):
                batches[-1].append(unit)
            else:
                batches.append([unit])
        return batches

    def _fits(self, batch: list[tuple[int, int, int]], unit: tuple[int, int, int]) -> bool:
        slot, length, row = unit
        sizes = [length, *(size for _, size, _ in batch)]
        if max(sizes) > MAX_WASTE * min(sizes) or slot + max(sizes) > self._slots:
            return False
        if len(batch) > 1 and slot - batch[-1][0] != batch[1][0] - batch[0][0]:
            return False
        return slot > batch[-1][0] and all(row != other for _, _, other in batch)

    def _rows(self, batch: Sequence[int]) -> Rows:
        """Neighbouring rows as a slice, which is a view."""
        if list(batch) == list(range(batch[0], batch[0] + len(batch))):
            return slice(batch[0], batch[0] + len(batch))
        return torch.tensor(batch, device=self._device)

    def _index(self, rows: list[list[Span]]) -> tuple[Tensor, Tensor | None]:
        """Slots of each row's spans, padded with the row's first slot; and the mask."""
        sizes = [sum(size for _, size in spans) for spans in rows]
        index = torch.empty(len(rows), max(sizes), dtype=torch.int64)
        for row, spans, size in zip(index, rows, sizes, strict=True):
            torch.cat([torch.arange(slot, slot + n) for slot, n in spans], out=row[:size])
            row[size:] = spans[0][0]
        return index.to(self._device), self._mask(sizes)

    def _mask(self, sizes: list[int]) -> Tensor | None:
        if min(sizes) == max(sizes):
            return None
        beyond = torch.arange(max(sizes))[None] >= torch.tensor(sizes)[:, None]
        mask = torch.zeros(beyond.shape).masked_fill_(beyond, float("-inf"))
        return mask[:, None, None].to(self._device)


def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, pages: Pages, parts: Sequence[Part]
) -> Tensor:
    """Attention of one layer.

    Args:
        query: (tokens, heads, head_dim).
        key: (tokens, kv_heads, head_dim) of this forward, as `Pages.write` returned it.
        value: as `key`.
        pages: the layer's.
        parts: from `plan_parts`; together they cover every token.

    Returns:
        (tokens, heads * head_dim)
    """
    if len(parts) == 1 and isinstance(parts[0].rows, slice):
        return _run(parts[0], query, key, value, pages, False)[0].flatten(1)
    merging = not all(part.first for part in parts)
    if not merging:
        whole = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for part in parts:
            whole[part.rows] = _run(part, query, key, value, pages, False)[0]
        return whole.flatten(1)
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    total = torch.full(query.shape[:2], float("-inf"), device=query.device)
    for part in parts:
        new, weight = _run(part, query, key, value, pages, True)
        if not part.first:
            old = total[part.rows]
            both = torch.logaddexp(old, weight)
            new = new * (weight - both).exp_()[..., None]
            new += out[part.rows] * (old - both).exp_()[..., None]
            weight = both
        out[part.rows], total[part.rows] = new.float(), weight
    return out.to(query.dtype).flatten(1)


def _run(
    part: Part, query: Tensor, key: Tensor, value: Tensor, pages: Pages, merging: bool
) -> tuple[Tensor, Tensor]:
    """One part: (rows, heads, head_dim) and, for merging, log-sum-exp (rows, heads)."""
    heads, width = query.shape[1:]
    asked = query[part.rows]
    rows = asked.shape[0]
    if part.fresh is not None:
        k, v = (t[part.fresh].transpose(0, 1)[None] for t in (key, value))
        asked = asked.transpose(0, 1)[None]
        out, total = _call(asked, k, v, part.causal, part.mask, merging)
        return out[0].transpose(0, 1), total[0].T
    k, v = part.keys_values(pages)
    # The query heads of one KV head stand as rows of one product.
    packed = asked.view(rows, k.shape[1], -1, width)
    if not part.shared:
        out, total = _call(packed, k, v, False, part.mask, merging)
        return out.reshape(rows, heads, width), total.reshape(rows, heads)
    packed = packed.transpose(0, 1).reshape(1, k.shape[1], -1, width)
    out, total = _call(packed, k, v, False, None, merging)
    out = out.reshape(k.shape[1], rows, -1, width).transpose(0, 1)
    total = total.reshape(k.shape[1], rows, -1).transpose(0, 1)
    return out.reshape(rows, heads, width), total.reshape(rows, heads)


def _call(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, merging: bool
) -> tuple[Tensor, Tensor]:
    """`attend`, or torch's own fastest kernel when the log-sum-exp is not needed."""
    if merging or query.device.type == "cpu":
        return attend(query, key, value, causal, mask)
    mask = mask if mask is None else mask.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, enable_gqa=grouped
    )
    return out, query.new_empty(query.shape[:3])
