# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-unimported"
"""The warp of `attend_wide` that has keys and values copied to shared memory, ahead of those that compute."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sagellm_ir.runtime.accel.kernels.common import ITEM_FIELDS

__all__ = ["PAGE", "SPAN", "bounds", "held", "item", "produce", "turns"]

PAGE = gl.constexpr(64)
"""Tokens of a page, and rows of a box that the copy engine fetches."""
SPAN = gl.constexpr(64)
"""Columns of such a box: 128 bytes, the width of a swizzled row."""


@gluon.jit
def item(items, index):
    """The fields of a work item."""
    at = items + index * ITEM_FIELDS
    owner = gl.load(at)
    lo = gl.load(at + 1)
    hi = gl.load(at + 2)
    end = gl.load(at + 3)
    q_first = gl.load(at + 4)
    q_len = gl.load(at + 5)
    tile = gl.load(at + 6)
    part = gl.load(at + 7)
    return owner, lo, hi, end, q_first, q_len, tile, part


@gluon.jit
def turns(sizes, SHARED: gl.constexpr, KV_HEADS: gl.constexpr):
    """A program's first (item, head), the steps to its next two, together, the first of them, and where
    they end.

    Dealt to and fro: the longest items come first, so a program that has the first of one round has the
    last of the next.

    SHARED: `sizes` says how many programs work. They are spread over the device; the others leave
    their SMs to the private kernel.
    """
    todo = gl.load(sizes) * KV_HEADS
    index = gl.program_id(0)
    programs = gl.num_programs(0)
    mine = index
    if SHARED:
        working = gl.load(sizes + 1)
        before = index * working // programs
        works = (index + 1) * working // programs > before
        mine = before
        index = gl.where(works, before, todo)
        programs = working
    return index, 2 * programs, 2 * (programs - mine) - 1, todo


@gluon.jit
def bounds(lo, hi, end, q_len, tile, SHARED: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr):
    """Behind the last key that any row of the tile sees, and behind the last that all see."""
    seen_by_all = hi
    if not SHARED:
        last = gl.minimum((tile * BM + BM - 1) // GROUP, q_len - 1)
        hi = gl.minimum(hi, end - q_len + last + 1)
        seen_by_all = gl.minimum(hi, end - q_len + tile * BM // GROUP + 1)
    return hi, seen_by_all


@gluon.jit
def held(at, hi):
    """How many of the tokens of the page at `at` lie before `hi`."""
    return gl.minimum(gl.maximum(hi - at, 0), PAGE)


@gluon.jit
def _pages(table, at, hi):
    """Page ids of the tile of keys at `at`."""
    first = gl.load(table + at // PAGE, mask=at < hi, other=0)
    second = gl.load(table + at // PAGE + 1, mask=at + PAGE < hi, other=0)
    return first, second


@gluon.jit
def _copy(
    turn,
    of,
    done,
    head,
    pages,
    at,
    hi,
    KEPT: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Start the copy of tile `turn` of keys or values when its place is free.

    That is when turn `turn - STAGES + KEPT` is done, whose products were the last to read it.

    Of a page that has `n` tokens before `hi` the box begins `PAGE - n` rows before it. The copy engine
    puts zeros there, so tokens that nobody sees are not read; those that are lie at the end.
    """
    cache, boxes, full = of
    first, second = pages
    freed = turn + KEPT
    mbarrier.wait(done.index(freed % STAGES), (freed // STAGES & 1) ^ 1)
    place = turn % STAGES
    ready = full.index(place)
    mbarrier.expect(ready, 2 * BN * D)
    row = held(at, hi) - PAGE
    later = held(at + PAGE, hi) - PAGE
    EACH: gl.constexpr = D // SPAN
    for k in gl.static_range(EACH):
        box = (place * EACH + k) * 2
        tma.async_copy_global_to_shared(
            cache, [first, row, head, k * SPAN], ready, boxes.index(box)
        )
        tma.async_copy_global_to_shared(
            cache, [second, later, head, k * SPAN], ready, boxes.index(box + 1)
        )


@gluon.jit
def produce(
    inputs,
    SHARED: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Bring the tiles of keys and values to shared memory, in the order in which they are used.

    Of keys and of values: the cache, boxes of half a tile's rows, and barriers that say of each tile
    whether it is there. Turn `j` reads the keys of tile `j` and, beside its softmax, the values of tile
    `j - 1`: those of tile `j - 2` are done with as soon as it has its scores, and it says so then.
    """
    keys, values, done, table, items, sizes, table_stride = inputs
    index, both, step, todo = turns(sizes, SHARED, KV_HEADS)
    turn = 0
    while index < todo:
        owner, lo, hi, end, _first, q_len, tile, _part = item(items, index // KV_HEADS)
        head = index % KV_HEADS
        hi, _seen = bounds(lo, hi, end, q_len, tile, SHARED, GROUP, BM)
        count = gl.maximum(gl.cdiv(hi - lo, BN), 1)
        pages_of = table + owner.to(gl.int64) * table_stride
        at = lo + (count - 1) * BN
        older = _pages(pages_of, at, hi)
        _copy(turn, keys, done, head, older, at, hi, 0, BN, D, STAGES)
        newer = _pages(pages_of, gl.maximum(at - BN, lo), hi)
        for j in range(1, count):
            at -= BN
            _copy(turn + j, keys, done, head, newer, at, hi, 0, BN, D, STAGES)
            _copy(turn + j - 1, values, done, head, older, at + BN, hi, 2, BN, D, STAGES)
            older = newer
            newer = _pages(pages_of, gl.maximum(at - BN, lo), hi)
        turn += count
        _copy(turn - 1, values, done, head, older, at, hi, 2, BN, D, STAGES)
        index += step
        step = both - step
