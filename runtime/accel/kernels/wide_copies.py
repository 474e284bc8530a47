# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-unimported"
"""The warps of `attend_wide` that copy keys and values to shared memory, ahead of those that compute."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from sagellm_ir.runtime.accel.kernels.common import ITEM_FIELDS

__all__ = ["bounds", "item", "produce"]


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
def bounds(lo, hi, end, q_len, tile, SHARED: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr):
    """Behind the last key that any row of the tile sees, and behind the last that all see."""
    seen_by_all = hi
    if not SHARED:
        last = gl.minimum((tile * BM + BM - 1) // GROUP, q_len - 1)
        hi = gl.minimum(hi, end - q_len + last + 1)
        seen_by_all = gl.minimum(hi, end - q_len + tile * BM // GROUP + 1)
    return hi, seen_by_all


@gluon.jit
def _pages(table, at, hi, BLOCK: gl.constexpr, BN: gl.constexpr, LOAD: gl.constexpr):
    """Page ids of the tile of keys at `at`: of its one or two pages, else one for each key."""
    if BN <= 2 * BLOCK:
        first = gl.load(table + at // BLOCK, mask=at < hi, other=0)
        second = first
        if BN > BLOCK:
            second = gl.load(table + at // BLOCK + 1, mask=at + BLOCK < hi, other=0)
    else:
        key = at + gl.arange(0, BN, gl.SliceLayout(1, LOAD))
        first = gl.load(table + key // BLOCK, mask=key < hi, other=0)
        second = first
    return first, second


@gluon.jit
def _copy(
    turn,
    to,
    base,
    pages,
    at,
    hi,
    page_stride: gl.constexpr,
    row_stride: gl.constexpr,
    BLOCK: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    LOAD: gl.constexpr,
):
    """Start the copy of a tile of keys or values when its place is free; zeros behind `hi`."""
    tiles, full, empty = to
    first, second = pages
    key = gl.arange(0, BN, gl.SliceLayout(1, LOAD))
    d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    page = first.to(gl.int64) * page_stride
    if BN == 2 * BLOCK:
        page = gl.where(key < BLOCK, page, second.to(gl.int64) * page_stride)
    if BN == BLOCK:
        source = base + page + (key[:, None] * row_stride + d[None, :])
    else:
        source = (base + page + key % BLOCK * row_stride)[:, None] + d[None, :]
    place = turn % STAGES
    mbarrier.wait(empty.index(place), (turn // STAGES & 1) ^ 1)
    inside = (at + key < hi)[:, None]
    async_copy.async_copy_global_to_shared(tiles.index(place), source, mask=inside)
    async_copy.mbarrier_arrive(full.index(place), increment_count=False)


@gluon.jit
def produce(
    inputs,
    k_page_stride: gl.constexpr,
    k_row_stride: gl.constexpr,
    k_head_stride: gl.constexpr,
    v_page_stride: gl.constexpr,
    v_row_stride: gl.constexpr,
    v_head_stride: gl.constexpr,
    SHARED: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Bring the tiles of keys and values to shared memory, in the order in which they are used.

    Of keys and of values: tiles, and barriers that say of each whether it is full or empty.
    """
    keys, values, k_ptr, v_ptr, table, items, sizes, table_stride = inputs
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    index = gl.program_id(0)
    todo = gl.load(sizes) * KV_HEADS
    turn = 0
    while index < todo:
        owner, lo, hi, end, _first, q_len, tile, _part = item(items, index // KV_HEADS)
        head = index % KV_HEADS
        hi, _seen = bounds(lo, hi, end, q_len, tile, SHARED, GROUP, BM)
        count = gl.maximum(gl.cdiv(hi - lo, BN), 1)
        pages_of = table + owner.to(gl.int64) * table_stride
        k_base = k_ptr + head * k_head_stride
        v_base = v_ptr + head * v_head_stride
        older = _pages(pages_of, lo, hi, BLOCK, BN, LOAD)
        _copy(
            *(turn, keys, k_base, older, lo, hi, k_page_stride, k_row_stride),
            *(BLOCK, BN, D, STAGES, LOAD),
        )
        newer = _pages(pages_of, lo + BN, hi, BLOCK, BN, LOAD)
        for j in range(1, count):
            at = lo + j * BN
            _copy(
                *(turn + j, keys, k_base, newer, at, hi, k_page_stride, k_row_stride),
                *(BLOCK, BN, D, STAGES, LOAD),
            )
            _copy(
                *(turn + j - 1, values, v_base, older, at - BN, hi, v_page_stride, v_row_stride),
                *(BLOCK, BN, D, STAGES, LOAD),
            )
            older = newer
            newer = _pages(pages_of, at + BN, hi, BLOCK, BN, LOAD)
        turn += count
        at = lo + (count - 1) * BN
        _copy(
            *(turn - 1, values, v_base, older, at, hi, v_page_stride, v_row_stride),
            *(BLOCK, BN, D, STAGES, LOAD),
        )
        index += gl.num_programs(0)
