"""The shared kernel's work list: packed nodes cut into chunks of keys and tiles of queries."""

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from sagellm_ir.runtime.accel.forest import Forest, Ints
from sagellm_ir.runtime.accel.gate import Gate
from sagellm_ir.runtime.accel.spec import AttentionSpec
from sagellm_ir.runtime.accel.tiles import Tile, tile_for

__all__ = [
    "CHUNK",
    "CHUNKS",
    "CUT_COST",
    "ITEM_FIELDS",
    "ROW_FIELDS",
    "SLOT_COST",
    "Limits",
    "SharedWork",
    "item_cost",
    "plan_shared",
]

CHUNK = 64
"""Keys of the smallest chunk, and what every chunk is a multiple of."""
CHUNKS = 40
"""Chunk lengths to choose from: 1, 2, 3, 4 times CHUNK, then four to each power of two."""
ITEM_COST = 64, 4
"""What starting and ending a work item costs, in keys: for any tile, and for each of its rows."""
CUT_COST = 128
"""What it costs, in keys, to merge partials in a batch that would have none."""
SLOT_COST = 4
"""What it costs, in keys, to merge one more piece of the longest part."""
ITEM_FIELDS = 8
"""Integers of a work item, see `kernels.common`."""
ROW_FIELDS = 8
"""Integers of a query row for `merge`, see `kernels.common`."""
_SIZES = np.array(
    [CHUNK * (k + 1) if k < 4 else CHUNK * (4 + k % 4) << (k // 4 - 1) for k in range(CHUNKS)]
)


@frozen
class Limits:
    """What the static buffers hold."""

    sms: int
    items: int
    rows: int
    """Query tokens of all nodes."""
    where: int
    """Entries of the merge's table (query token x shared slot)."""
    parts: int
    """Partial results of a KV head (query token x head of the group x slot)."""


@frozen(eq=False)
class SharedWork:
    """Arrays the shared kernel reads; all int32."""

    tile_rows: int
    items: Ints
    """`[items, ITEM_FIELDS]`."""
    rows: Ints
    """Query tokens of the nodes, one node after another."""
    slots: Ints
    """`[batch]`: partials that a query of the sequence gets from nodes; its private ones follow."""
    where_start: Ints
    """`[batch]`: a sequence's first entry in `where`."""
    where: Ints
    """The partials of a query token's first head from nodes, in the order of the keys."""
    parts: int
    """Partials written by the shared kernel."""
    chunk: int


def plan_shared(
    spec: AttentionSpec, forest: Forest, q_start: Ints, gate: Gate, limits: Limits
) -> SharedWork | None:
    """Cut a forest's nodes into work items; None: nothing is shared, or the buffers are too small.

    A query's partials lie in the order of the keys, the same for all sequences of a node, since
    they have the same nodes above it.
    """
    lists = [_queries(node.rows, q_start) for node in forest.nodes]
    if not lists or sum(map(len, lists)) > limits.rows:
        return None
    lengths = np.array([node.end - node.begin for node in forest.nodes])
    queries = np.array([len(rows) for rows in lists])
    tile = tile_for(
        spec, gate.tile_rows(spec, list(zip(queries.tolist(), lengths.tolist(), strict=True)))
    )
    tiles = -(-queries * spec.group // tile.rows)
    chunk = _chunk(spec, tile, lengths, queries, tiles, int(q_start[-1]), limits)
    if chunk is None:
        return None
    cuts = -(-lengths // chunk)
    size = cuts * queries * spec.group
    first_part = np.cumsum(size) - size
    items = _items(spec, forest, queries, tiles, cuts, first_part, chunk)
    slots, start, where = _where(spec, forest, lists, q_start, cuts, first_part)
    rows = np.concatenate(lists)
    return SharedWork(tile.rows, items, rows, slots, start, where, int(size.sum()), chunk)


def _items(
    spec: AttentionSpec,
    forest: Forest,
    queries: Ints,
    tiles: Ints,
    cuts: Ints,
    first_part: Ints,
    chunk: int,
) -> Ints:
    """The work items. Tiles of one chunk are neighbours: the first brings its pages to L2."""
    count = tiles * cuts
    node = np.repeat(np.arange(len(count)), count)
    local = np.arange(len(node)) - np.repeat(np.cumsum(count) - count, count)
    cut, tile = np.divmod(local, tiles[node])
    of_nodes = np.array([(x.rows[0], x.begin, x.end) for x in forest.nodes])[node]
    items = np.zeros((len(node), ITEM_FIELDS), np.int32)
    items[:, 0] = of_nodes[:, 0]
    items[:, 1] = of_nodes[:, 1] + cut * chunk
    items[:, 2] = np.minimum(items[:, 1] + chunk, of_nodes[:, 2])
    items[:, 4] = (np.cumsum(queries) - queries)[node]
    items[:, 5] = queries[node]
    items[:, 6] = tile
    items[:, 7] = first_part[node] + cut * queries[node] * spec.group
    return items


def _where(
    spec: AttentionSpec, forest: Forest, lists: list[Ints], q_start: Ints, cuts: Ints, parts: Ints
) -> tuple[Ints, Ints, Ints]:
    """`slots`, `where_start` and `where` of `SharedWork`."""
    new = np.diff(q_start)
    slots = np.zeros(len(new), np.int32)
    for node, cut in zip(forest.nodes, cuts, strict=True):
        slots[node.rows] += cut
    size = new * slots
    start = (np.cumsum(size) - size).astype(np.int32)
    where = np.empty(int(size.sum()), np.int32)
    # Of each query token: its first entry.
    entry = np.repeat(start - q_start[:-1] * slots, new) + np.arange(q_start[-1]) * np.repeat(
        slots, new
    )
    for rows, cut, part in zip(lists, cuts, parts, strict=True):
        at = np.arange(cut)[None, :]
        index = np.arange(len(rows))[:, None]
        where[entry[rows][:, None] + at] = part + (at * len(rows) + index) * spec.group
        entry[rows] += cut
    return slots, start, where


def _queries(rows: Ints, q_start: Ints) -> Ints:
    """Query tokens of some sequences."""
    first: Ints = q_start[rows]
    count = q_start[rows + 1] - first
    if (count == 1).all():
        return first
    skip = np.repeat(np.cumsum(count) - count, count)
    found: Ints = (np.arange(count.sum()) - skip + np.repeat(first, count)).astype(np.int32)
    return found


def _chunk(
    spec: AttentionSpec,
    tile: Tile,
    lengths: Ints,
    queries: Ints,
    tiles: Ints,
    all_queries: int,
    limits: Limits,
) -> int | None:
    """The chunk length with the smallest `makespan` whose lists fit, as `schedule` on the device."""
    longest = int(lengths.max())
    sizes = np.concatenate([_SIZES[longest > _SIZES], [longest]])[::-1]
    cuts = -(-lengths // sizes[:, None])
    items = cuts @ tiles
    # One private slot each comes on top; the device cuts no further than there is room.
    entries = cuts @ queries
    parts = (entries + all_queries) * spec.group
    grid = limits.sms * tile.ctas
    work = float(lengths @ tiles * spec.kv_heads)
    cost = makespan(work, items * spec.kv_heads, sizes, grid, item_cost(tile))
    cost += SLOT_COST * cuts.max(1)
    fits = (items <= limits.items) & (parts <= limits.parts) & (entries <= limits.where)
    return int(sizes[np.where(fits, cost, np.inf).argmin()]) if fits.any() else None


def item_cost(tile: Tile) -> int:
    """What starting and ending an item of a tile costs, in keys."""
    return ITEM_COST[0] + ITEM_COST[1] * tile.rows


def makespan(work: float, items: Ints, size: Ints, grid: int, cost: int) -> NDArray[np.float64]:
    """When `grid` programs have done `items` items of up to `size` keys, `work` in all; in keys.

    In one round the longest item decides. In more, programs take the next item when they are done
    with one (Graham's list scheduling): the mean, and on average half an item at the end.

    Args:
        cost: of an item besides its keys, see `item_cost`.
    """
    one = size + cost
    return np.where(items <= grid, one, (work + items * cost) / grid + one / 2)
