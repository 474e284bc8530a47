# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: SIM108
"""`attend`: partial attention of one work item and KV head at a time."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sagellm_ir.runtime.accel.kernels.common import ITEM_FIELDS, LOG2E, NEG_INF
from sagellm_ir.runtime.accel.kernels.walk import walk

__all__ = ["attend"]

FAR = tl.constexpr(2147483647)


@triton.jit
def _position(row, row_seq, q_start, kv_lens):
    """Positions of query tokens in their sequences."""
    seq = tl.load(row_seq + row)
    return tl.load(kv_lens + seq) - tl.load(q_start + seq + 1) + row


@triton.jit
def _item(items, index):
    """The fields of a work item."""
    at = items + index * ITEM_FIELDS
    owner = tl.load(at)
    lo = tl.load(at + 1)
    hi = tl.load(at + 2)
    end = tl.load(at + 3)
    q_first = tl.load(at + 4)
    q_len = tl.load(at + 5)
    tile = tl.load(at + 6)
    part = tl.load(at + 7)
    return owner, lo, hi, end, q_first, q_len, tile, part


# Tables of any width: one binary, not one for multiples of 16 and another for the rest.
@triton.jit(do_not_specialize=["table_stride"])
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    ks_ptr,
    vs_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    sinks,
    table,
    kv_lens,
    q_start,
    row_seq,
    rows,
    items,
    sizes,
    taken,
    qk_scale,
    out_scale,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    out_head_stride,
    table_stride,
    k_page_stride: tl.constexpr,
    k_row_stride: tl.constexpr,
    k_head_stride: tl.constexpr,
    v_page_stride: tl.constexpr,
    v_row_stride: tl.constexpr,
    v_head_stride: tl.constexpr,
    ks_page_stride: tl.constexpr,
    ks_row_stride: tl.constexpr,
    ks_head_stride: tl.constexpr,
    vs_page_stride: tl.constexpr,
    vs_row_stride: tl.constexpr,
    vs_head_stride: tl.constexpr,
    SHARED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KV: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    EARLY: tl.constexpr,
    BESIDE: tl.constexpr,
    LATE: tl.constexpr,
):
    """Attention of packed query rows over a chunk of keys: one (item, KV head) at a time.

    SHARED: queries are those of a node's sequences, listed in `rows`; all of them come after all of
    the keys. Otherwise they are new tokens of one sequence, side by side in `q`, and causal. An
    item without partials (a sequence read in one piece) writes its output.

    Each program begins with the item of its number. Where there are more, `taken` counts those that
    programs took after it; `merge` sets it back. So programs that start late, beside those of the
    other kernel, find the work that is left. SHARED: `sizes` also says how many programs work; the
    others leave room.

    EARLY: the next kernel of the layer may start now; it waits for this one where it has to.
    BESIDE: this one may run beside the kernel before it, and ends after it.
    LATE: so many programs start only when that one has ended that all items are taken, the first too.
    """
    if EARLY:
        gdc_launch_dependents()
    d = tl.arange(0, BD)
    programs = tl.num_programs(0)
    todo = tl.load(sizes) * KV_HEADS
    if LATE:
        programs = 0
        index = tl.atomic_add(taken, 1, sem="relaxed")
        first = tl.where(index < todo, index // KV_HEADS, 0)
    else:
        index = tl.program_id(0)
        # The first item is read before it is known to be one: the list has room for it.
        first = index // KV_HEADS
    owner, lo, hi, end, q_first, q_len, tile, part = _item(items, first)
    if SHARED:
        programs = tl.load(sizes + 1)
        index = tl.where(index < programs, index, todo)
    while index < todo:
        # Heads lie side by side in a page: neighbours in the grid read neighbouring bytes.
        head = index % KV_HEADS
        r = tile * BM + tl.arange(0, BM)
        live = r < q_len * GROUP
        qi = tl.where(live, r // GROUP, 0)
        row = q_first + qi
        q_head = head * GROUP + r % GROUP
        low = tl.zeros([BM], tl.int32)
        if SHARED:
            row = tl.load(rows + row)
            high = tl.full([BM], FAR, tl.int32)
            if WINDOW > 0:
                high = _position(row, row_seq, q_start, kv_lens)
            seen_by_all = hi
        else:
            high = end - q_len + qi
            last = tl.minimum((tile * BM + BM - 1) // GROUP, q_len - 1)
            hi = tl.minimum(hi, end - q_len + last + 1)
            seen_by_all = tl.minimum(hi, end - q_len + tile * BM // GROUP + 1)
        if WINDOW > 0:
            low = tl.where(live, tl.maximum(high - WINDOW + 1, 0), FAR)
            lo = tl.maximum(lo, tl.min(low, 0) // BLOCK * BLOCK)

        q_at = q_ptr + row.to(tl.int64) * q_row_stride + q_head * q_head_stride
        if D == BD:
            q_mask = live[:, None]
        else:
            q_mask = live[:, None] & (d < D)[None, :]
        q = tl.load(q_at[:, None] + d[None, :], mask=q_mask, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        q_sum = tl.zeros([BM], tl.float32)
        if KV == "int8":
            q_sum = tl.sum(q.to(tl.float32), 1)
        pages_of = table + owner.to(tl.int64) * table_stride
        if BLOCK % BN == 0:
            pages = tl.load(pages_of + lo // BLOCK, mask=lo < hi, other=0)
        else:
            key = lo + tl.arange(0, BN)
            pages = tl.load(pages_of + key // BLOCK, mask=key < hi, other=0)

        acc = tl.zeros([BM, BD], tl.float32)
        m = tl.full([BM], NEG_INF, tl.float32)
        # In small tiles the warps share rows: their sums meet once, behind the loop.
        if BM <= 32:
            den = tl.zeros([BM, BN], tl.float32)
        else:
            den = tl.zeros([BM], tl.float32)
        # Large tiles are bound by arithmetic: tiles of keys that all rows see run without masks.
        # Small ones are bound by memory: one loop, so that the pipeline is filled once.
        PHASES: tl.constexpr = 2 if BM >= 64 and WINDOW == 0 else 1
        free = lo
        if PHASES == 2:
            free = lo + tl.maximum(seen_by_all - lo, 0) // BN * BN
        for phase in tl.static_range(PHASES):
            acc, m, den, pages = walk(
                acc,
                m,
                den,
                pages,
                q,
                q_sum,
                low,
                high,
                lo if phase == 0 else free,
                hi if phase == PHASES - 1 else free,
                hi,
                pages_of,
                k_ptr + head * k_head_stride,
                v_ptr + head * v_head_stride,
                ks_ptr + head * ks_head_stride,
                vs_ptr + head * vs_head_stride,
                k_page_stride,
                v_page_stride,
                ks_page_stride,
                vs_page_stride,
                k_row_stride,
                v_row_stride,
                ks_row_stride,
                vs_row_stride,
                qk_scale,
                SOFTCAP,
                KV,
                UPCAST,
                BLOCK,
                BN,
                BD,
                D,
                phase == PHASES - 1,
            )

        # The next item is on its way while this one ends.
        following = todo
        if todo > programs:
            following = programs + tl.atomic_add(taken, 1, sem="relaxed")
        upcoming = _item(items, tl.where(following < todo, following // KV_HEADS, 0))

        if BM <= 32:
            den = tl.sum(den, 1)
        some = den > 0.0
        alone = False
        if not SHARED:
            alone = part < 0
        if alone:
            total = den
            if SINKS:
                sink = tl.load(sinks + q_head, mask=live, other=0.0).to(tl.float32)
                total += tl.where(some, tl.exp2(sink * LOG2E - m), 0.0)
            o = acc * (out_scale / tl.where(some, total, 1.0))[:, None]
            out_at = out_ptr + row.to(tl.int64) * out_row_stride + q_head * out_head_stride
            tl.store(out_at[:, None] + d[None, :], o.to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            lse = tl.where(some, m + tl.log2(tl.where(some, den, 1.0)), NEG_INF)
            at = (part + tile * BM).to(tl.int64) * KV_HEADS + head
            r0 = tl.arange(0, BM)
            tl.store(lse_ptr + at + r0 * KV_HEADS, lse, mask=live)
            o = acc * (out_scale / tl.where(some, den, 1.0))[:, None]
            part_at = (part_ptr + at * D) + (r0[:, None] * (KV_HEADS * D) + d[None, :])
            tl.store(part_at, o, mask=q_mask & some[:, None])

        index = following
        owner, lo, hi, end, q_first, q_len, tile, part = upcoming
    if BESIDE:
        gdc_wait()
