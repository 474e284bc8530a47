"""The shared kernel's work list: packed nodes cut into chunks of keys and tiles of queries."""

import math
from functools import lru_cache

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from sagellm_ir.runtime.accel.division import Counts, Division, Pieces, Private, divide
from sagellm_ir.runtime.accel.forest import Forest, Ints
from sagellm_ir.runtime.accel.gate import Gate, ceil_div
from sagellm_ir.runtime.accel.spec import AttentionSpec
from sagellm_ir.runtime.accel.tiles import Tile, tile_for

__all__ = [
    "CHUNK",
    "CHUNKS",
    "CUT_COST",
    "FEW",
    "ITEM_FIELDS",
    "PART_COST",
    "ROW_FIELDS",
    "SLOT_COST",
    "SLOWER",
    "Limits",
    "SharedWork",
    "item_cost",
    "plan_shared",
]

CHUNK = 64
"""Keys of the smallest chunk, and what every chunk is a multiple of."""
CHUNKS = 40
"""Chunk lengths to choose from: the longest part in 2, 3, 4 equal pieces, then four numbers of pieces
to each power of two. Equal, so that no program is left with a long piece while others have a rest."""
ITEM_COST = 64, 4
"""What starting and ending a work item costs, in keys: for any tile, and for each of its rows."""
FEW, SLOWER = 0.9, 0.08
"""Of an item's time: what it takes at least when few do, and what slower programs take more. Measured on
an H200 with nothing shared."""
CUT_COST = 128
"""What it costs, in keys, to merge partials in a batch that would have none."""
SLOT_COST = 4
"""What it costs, in keys, to merge one more piece of the longest part."""
PART_COST = 0.0002
"""What it costs, in keys for each row of a tile, to write and to merge the partial of one row."""
ITEM_FIELDS = 8
"""Integers of a work item, see `kernels.common`."""
ROW_FIELDS = 8
"""Integers of a query row for `merge`, see `kernels.common`."""
_PIECES = np.array([k + 2 if k < 3 else (5 + (k - 3) % 4) << (k - 3) // 4 for k in range(CHUNKS)])


@frozen(cache_hash=True)
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
    programs: int
    """Programs of the shared kernel that work."""
    left: int
    """SMs that those leave to private programs alone."""
    private_cuts: int
    """Pieces of the longest private part; 0: as `schedule` thinks best."""


def plan_shared(
    spec: AttentionSpec,
    forest: Forest,
    q_start: Ints,
    gate: Gate,
    limits: Limits,
    private: Private | None = None,
) -> SharedWork | None:
    """Cut a forest's nodes into work items; None: nothing is shared, or the buffers are too small.

    A query's partials lie in the order of the keys, the same for all sequences of a node, since
    they have the same nodes above it.

    Args:
        private: the private parts, if the private kernel may read them at the same time, on other SMs.
    """
    one_each = bool((q_start[1:] - q_start[:-1] == 1).all())
    lists = [node.rows if one_each else _queries(node.rows, q_start) for node in forest.nodes]
    if not lists or sum(map(len, lists)) > limits.rows:
        return None
    sizes = tuple((node.queries, node.end - node.begin) for node in forest.nodes)
    how = _cut(spec, gate, sizes, int(q_start[-1]), limits, _in_steps(private))
    if how is None:
        return None
    tile, division = how
    chunk, programs = division.chunk, division.programs
    cuts = tuple((queries, ceil_div(tokens, chunk)) for queries, tokens in sizes)
    items = _items(spec, forest, tile.rows, chunk)
    rows = lists[0] if len(lists) == 1 else np.concatenate(lists)
    slots, start, where = _where(spec.group, cuts, rows, q_start)
    parts, left = len(where) * spec.group, limits.sms - programs // tile.ctas
    return SharedWork(
        *(tile.rows, items, rows, slots, start, where, parts, programs, left, division.cuts)
    )


def _in_steps(private: Private | None) -> Private | None:
    """So that what is remembered for private parts is found again when they have grown."""
    if private is None or private.keys == 0:
        return None

    def step(size: int) -> int:
        unit = 1 << max(size.bit_length() - 5, 0)
        return ceil_div(size, unit) * unit

    return Private(
        *(step(private.keys), step(private.longest), private.tiles, private.queries, private.ctas)
    )


def _items(spec: AttentionSpec, forest: Forest, tile_rows: int, chunk: int) -> Ints:
    """The work items."""
    nodes = tuple((node.queries, node.begin, node.end) for node in forest.nodes)
    items = _items_by_node(spec.group, nodes, tile_rows, chunk).copy()
    items[:, 0] = np.array([node.rows[0] for node in forest.nodes])[items[:, 0]]
    return items


@lru_cache(maxsize=64)
def _items_by_node(
    group: int, nodes: tuple[tuple[int, int, int], ...], tile_rows: int, chunk: int
) -> Ints:
    """The work items of (queries, begin, end) nodes, with a node's number where its first sequence goes.
    Tiles of one chunk are neighbours: the first brings its pages to L2."""
    found, query, part = [], 0, 0
    for number, (many, start, end) in enumerate(nodes):
        wide, cut = ceil_div(many * group, tile_rows), ceil_div(end - start, chunk)
        mine = np.zeros((cut, wide, ITEM_FIELDS), np.int32)
        begin = np.arange(start, start + cut * chunk, chunk)
        mine[:, :, 0] = number
        mine[:, :, 1] = begin[:, None]
        mine[:, :, 2] = np.minimum(begin + chunk, end)[:, None]
        mine[:, :, 4:6] = query, many
        mine[:, :, 6] = np.arange(wide)
        mine[:, :, 7] = part + np.arange(cut)[:, None] * (many * group)
        found.append(mine.reshape(-1, ITEM_FIELDS))
        query += many
        part += cut * many * group
    return np.concatenate(found)


def _where(
    group: int, nodes: tuple[tuple[int, int], ...], tokens: Ints, q_start: Ints
) -> tuple[Ints, Ints, Ints]:
    """`slots`, `where_start` and `where` of `SharedWork`.

    Args:
        nodes: query tokens and pieces of each.
        tokens: their query tokens, one node after another.
    """
    pieces, where = _partials(group, nodes)
    each = np.repeat(tokens, pieces)
    # Of each token in turn, what it gets from its nodes: parents come before children.
    where = where[np.argsort(each, kind="stable")]
    of_token = np.bincount(each, minlength=int(q_start[-1]) + 1).astype(np.int32)
    first = np.cumsum(of_token, dtype=np.int32) - of_token
    return of_token[q_start[:-1]], first[q_start[:-1]], where


@lru_cache(maxsize=64)
def _partials(group: int, nodes: tuple[tuple[int, int], ...]) -> tuple[Ints, Ints]:
    """Of each query token of each node the number of its pieces, and the partials of all of these."""
    tables, part = [], 0
    for count, cut in nodes:
        last = part + cut * count * group
        table = np.arange(part, last, group, dtype=np.int32)
        tables.append(table.reshape(cut, count).T.reshape(-1))
        part = last
    pieces = np.repeat([cut for _, cut in nodes], [count for count, _ in nodes])
    return pieces.astype(np.int32), np.concatenate(tables)


def _queries(rows: Ints, q_start: Ints) -> Ints:
    """Query tokens of some sequences."""
    first: Ints = q_start[rows]
    count = q_start[rows + 1] - first
    skip = np.repeat(np.cumsum(count) - count, count)
    found: Ints = (np.arange(count.sum()) - skip + np.repeat(first, count)).astype(np.int32)
    return found


Nodes = tuple[tuple[int, int], ...]
"""Query tokens and length of each. A server sees the same ones again and again."""


@lru_cache(maxsize=4096)
def _cut(
    spec: AttentionSpec,
    gate: Gate,
    nodes: Nodes,
    all_queries: int,
    limits: Limits,
    private: Private | None,
) -> tuple[Tile, Division] | None:
    """The tile and the division of the SMs that take the least time; None: no lists fit."""
    tile = tile_for(spec, gate.tile_rows(spec, nodes))
    largest = tile_for(spec, gate.heights(spec)[-1])
    if private and largest.wide:
        seconds, rows = gate.undivided(spec, nodes, private.keys)
        pieces = _pieces(spec, largest, nodes, all_queries, limits)
        shared = sum(tokens for _, tokens in nodes)
        best = divide(spec, gate, largest, pieces, limits.sms, shared, private)
        if best is not None:
            if best.seconds < seconds:
                return largest, best
            tile = tile_for(spec, rows) if rows else tile
    pieces = _pieces(spec, tile, nodes, all_queries, limits)
    if not pieces.fits.any():
        return None
    programs = limits.sms * tile.ctas
    cost = makespan(pieces.work, pieces.items, pieces.sizes, programs, item_cost(tile))
    cost += SLOT_COST * pieces.cuts + PART_COST * tile.rows * spec.kv_heads * pieces.parts
    cost = np.where(pieces.fits, cost, np.inf)
    return tile, Division(math.nan, int(pieces.sizes[cost.argmin()]), programs, 0)


def _pieces(
    spec: AttentionSpec, tile: Tile, nodes: Nodes, all_queries: int, limits: Limits
) -> Pieces:
    """Nodes in pieces of all the lengths there are to choose from."""
    queries, lengths = np.array(nodes).T
    tiles = -(-queries * spec.group // tile.rows)
    longest = int(lengths.max())
    sizes = -(-longest // (_PIECES * CHUNK)) * CHUNK
    sizes = np.concatenate([[longest], sizes[sizes < longest]])
    cuts = (lengths + sizes[:, None] - 1) // sizes[:, None]
    items = cuts @ tiles
    # One private slot each comes on top; the device cuts no further than there is room.
    entries = cuts @ queries
    parts = (entries + all_queries) * spec.group
    fits = (items <= limits.items) & (parts <= limits.parts) & (entries <= limits.where)
    work = float(lengths @ tiles * spec.kv_heads)
    return Pieces(sizes, cuts.max(1), items * spec.kv_heads, parts, fits, work)


def item_cost(tile: Tile) -> int:
    """What starting and ending an item of a tile costs, in keys."""
    return ITEM_COST[0] + ITEM_COST[1] * tile.rows


def makespan(work: float, items: Counts, size: Counts, grid: int, cost: int) -> NDArray[np.float64]:
    """When `grid` programs have done `items` items of up to `size` keys, `work` in all; in keys.

    In one round the longest item decides, a little less the fewer there are. In more, programs take the
    next item when they are done with one (Graham's list scheduling): the mean, and on average half an
    item at the end, but no more than whole rounds. Some programs are slower than others.

    Args:
        cost: of an item besides its keys, see `item_cost`.
    """
    one = size + cost
    listed = (work + items * cost) / grid + one / 2
    rounds = np.where(items < grid, items / grid, -(-items // grid))
    whole = np.maximum(FEW * one, np.minimum(rounds * one, listed))
    longest: NDArray[np.float64] = whole + SLOWER * one
    return longest
