# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-unimported"
# ruff: noqa: SIM102
"""`attend_wide`: `attend` for tiles of 128 rows, with a warp that copies and warps that compute.

The roles, and the softmax beside a product, after FlashAttention-3 (arXiv 2407.08608).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sagellm_ir.runtime.accel.kernels.common import NEG_INF
from sagellm_ir.runtime.accel.kernels.wide_copies import (
    PAGE,
    SPAN,
    bounds,
    held,
    item,
    produce,
    turns,
)

__all__ = ["attend_wide"]


@gluon.jit
def _by_thread(s, BN: gl.constexpr):
    """A row as its four threads hold it: axis 3 is the thread, the others are what it has.

    Reduced axis after axis, a row is a few short chains of dependent instructions, not a long one.
    """
    return s.reshape([64, 4, BN // 32, 4, 2])


@gluon.jit
def _sums(s, BN: gl.constexpr):
    """Of each row, the sums of its four threads. They meet once, behind the loop."""
    return gl.sum(gl.sum(gl.sum(_by_thread(s, BN), 4), 2), 1)


@gluon.jit
def _hide(s, high, at, hi, BN: gl.constexpr, S: gl.constexpr):
    """Scores of the tile at `at`, without those of keys that are not there or that a row does not see."""
    column = gl.arange(0, BN, gl.SliceLayout(0, S))
    skipped = PAGE - gl.where(column < PAGE, held(at, hi), held(at + PAGE, hi))
    there = column % PAGE >= skipped
    seen = (at + column - skipped)[None, :] <= high[:, None]
    return gl.where(seen & there[None, :], s, NEG_INF)


@gluon.jit
def _soften(s, m, qk_scale, BLIND: gl.constexpr, BN: gl.constexpr):
    """One step of the online softmax: weights, their maximum so far, what older ones shrink by.

    BLIND: rows may have seen no key yet.
    """
    of_threads = gl.max(gl.max(gl.max(_by_thread(s, BN), 4), 2), 1)
    m_new = gl.maximum(m, gl.convert_layout(gl.max(of_threads, 1), m.type.layout) * qk_scale)
    base = m_new
    if BLIND:
        base = gl.where(m_new == NEG_INF, 0.0, m_new)
    p = gl.exp2(s * qk_scale - base[:, None])
    return p, m_new, gl.exp2(m - base)


@gluon.jit
def _consume(
    WHICH: gl.constexpr,
    inputs,
    SHARED: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attention of 64 rows of each tile.

    Backwards from the last tile of keys, so that the tiles that need masks come first. In turn `j` the
    scores of one tile and the output of the tile before are started; as soon as the scores are there
    their softmax runs, beside the product for the output.
    """
    q_tiles, of_keys, of_values, done, tensors, numbers = inputs
    k_tiles, k_full = of_keys
    v_tiles, v_full = of_values
    q_ptr, out_ptr, part_ptr, lse_ptr, rows, items, sizes = tensors
    qk_scale, out_scale, q_row_stride, q_head_stride, out_row_stride, out_head_stride = numbers
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_tile = q_tiles.index(WHICH)
    none = gl.zeros([64, BN], gl.float32, S)
    index, both, step, todo = turns(sizes, SHARED, KV_HEADS)
    turn = 0
    while index < todo:
        _owner, lo, hi, end, q_first, q_len, tile, part = item(items, index // KV_HEADS)
        head = index % KV_HEADS
        hi, seen_by_all = bounds(lo, hi, end, q_len, tile, SHARED, GROUP, BM)
        count = gl.maximum(gl.cdiv(hi - lo, BN), 1)
        masked = count - gl.maximum(seen_by_all - lo, 0) // BN
        first_row = tile * BM + WHICH * 64

        # Queries, by way of registers: their rows may lie anywhere.
        row_q = first_row + gl.arange(0, 64, gl.SliceLayout(1, LOAD))
        live_q = row_q < q_len * GROUP
        d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
        query = q_first + gl.where(live_q, row_q // GROUP, 0)
        if SHARED:
            query = gl.load(rows + query)
        q_head = head * GROUP + row_q % GROUP
        q_at = q_ptr + query.to(gl.int64) * q_row_stride + q_head * q_head_stride
        q_tile.store(gl.load(q_at[:, None] + d[None, :], mask=live_q[:, None], other=0.0))
        fence_async_shared()

        if SHARED:
            high = gl.full([64], 2147483647, gl.int32, gl.SliceLayout(1, S))
        else:
            r = first_row + gl.arange(0, 64, gl.SliceLayout(1, S))
            high = end - q_len + gl.minimum(r // GROUP, q_len - 1)
        acc = gl.zeros([64, D], gl.float32, O)
        m = gl.full([64], NEG_INF, gl.float32, gl.SliceLayout(1, S))
        mbarrier.wait(k_full.index(turn % STAGES), turn // STAGES & 1)
        keys = k_tiles.index(turn % STAGES).permute((1, 0))
        s = warpgroup_mma(q_tile, keys, none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(done.index(turn % STAGES), count=1)
        last = lo + (count - 1) * BN
        s, m, shrink = _soften(_hide(s, high, last, hi, BN, S), m, qk_scale, True, BN)
        den = _sums(s, BN)
        p = gl.convert_layout(s.to(dtype), P)

        for j in range(1, count):
            now = turn + j
            mbarrier.wait(k_full.index(now % STAGES), now // STAGES & 1)
            keys = k_tiles.index(now % STAGES).permute((1, 0))
            scores = warpgroup_mma(q_tile, keys, none, use_acc=False, is_async=True)
            before = now - 1
            mbarrier.wait(v_full.index(before % STAGES), before // STAGES & 1)
            values = v_tiles.index(before % STAGES)
            weighed = warpgroup_mma(p, values, acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(done.index(now % STAGES), count=1)
            # Of a shared chunk all rows see all keys: only its last tile can have too many.
            if not SHARED:
                if j < masked:
                    s = _hide(s, high, last - j * BN, hi, BN, S)
            s, m, shrink = _soften(s, m, qk_scale, not SHARED, BN)
            shrunk = gl.convert_layout(shrink, gl.SliceLayout(1, den.type.layout))
            den = den * shrunk[:, None] + _sums(s, BN)
            fresh = gl.convert_layout(s.to(dtype), P)
            acc, p, fresh = warpgroup_mma_wait(0, deps=[weighed, p, fresh])
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
            p = fresh

        turn += count
        before = turn - 1
        mbarrier.wait(v_full.index(before % STAGES), before // STAGES & 1)
        weighed = warpgroup_mma(p, v_tiles.index(before % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[weighed])

        m = gl.convert_layout(m, gl.SliceLayout(1, O))
        den = gl.convert_layout(gl.sum(den, 1), gl.SliceLayout(1, O))
        some = den > 0.0
        o = acc * (out_scale / gl.where(some, den, 1.0))[:, None]
        r0 = gl.arange(0, 64, gl.SliceLayout(1, O))
        d_out = gl.arange(0, D, gl.SliceLayout(0, O))
        r_out = first_row + r0
        live = r_out < q_len * GROUP
        at_part = (part + first_row).to(gl.int64) * KV_HEADS + head
        lse = gl.where(some, m + gl.log2(gl.where(some, den, 1.0)), NEG_INF)
        lse_at = lse_ptr + at_part + r0 * KV_HEADS
        part_at = (part_ptr + at_part * D) + (r0[:, None] * (KV_HEADS * D) + d_out[None, :])
        if SHARED:
            gl.store(lse_at, lse, mask=live)
            gl.store(part_at, o, mask=live[:, None])
        else:
            if part < 0:
                row = q_first + r_out // GROUP
                o_head = head * GROUP + r_out % GROUP
                out_at = out_ptr + row.to(gl.int64) * out_row_stride + o_head * out_head_stride
                gl.store(out_at[:, None] + d_out[None, :], o.to(dtype), mask=live[:, None])
            else:
                gl.store(lse_at, lse, mask=live)
                gl.store(part_at, o, mask=live[:, None])
        index += step
        step = both - step


# Tables of any width: one binary, not one for multiples of 16 and another for the rest.
@gluon.jit(do_not_specialize=["table_stride"])
def attend_wide(
    q_ptr,
    k_cache,
    v_cache,
    out_ptr,
    part_ptr,
    lse_ptr,
    table,
    rows,
    items,
    sizes,
    qk_scale,
    out_scale,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    out_head_stride,
    table_stride,
    SHARED: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
    BESIDE: gl.constexpr,
):
    """See `attend`. One warp copies, two times four compute 64 rows each of a tile of 128.

    The caches come as descriptors of boxes of `PAGE` rows and `SPAN` columns of one page and head.

    Items are dealt, see `turns`.
    """
    if EARLY:
        gdc_launch_dependents()
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], TILE)
    # Side by side, the boxes of a tile are the tile.
    BOXES: gl.constexpr = STAGES * (D // SPAN) * 2
    BOX: gl.constexpr = [BOXES, 1, PAGE, 1, SPAN]
    k_boxes = gl.allocate_shared_memory(dtype, BOX, k_cache.layout)
    v_boxes = gl.allocate_shared_memory(dtype, BOX, v_cache.layout)
    k_tiles = k_boxes._reinterpret(dtype, [STAGES, BN, D], TILE)
    v_tiles = v_boxes._reinterpret(dtype, [STAGES, BN, D], TILE)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(done.index(stage), count=2)
    keys = k_tiles, k_full
    values = v_tiles, v_full
    tensors = (q_ptr, out_ptr, part_ptr, lse_ptr, rows, items, sizes)
    numbers = (qk_scale, out_scale, q_row_stride, q_head_stride, out_row_stride, out_head_stride)
    consumer = (q_tiles, keys, values, done, tensors, numbers)
    of_keys = k_cache, k_boxes, k_full
    of_values = v_cache, v_boxes, v_full
    producer = (of_keys, of_values, done, table, items, sizes, table_stride)
    # What is known when compiling is lost in a tuple that has a name.
    gl.warp_specialize(
        [
            (_consume, (0, consumer, SHARED, KV_HEADS, GROUP, D, BM, BN, STAGES)),
            (_consume, (1, consumer, SHARED, KV_HEADS, GROUP, D, BM, BN, STAGES)),
            (produce, (producer, SHARED, KV_HEADS, GROUP, D, BM, BN, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
    if BESIDE:
        gdc_wait()
