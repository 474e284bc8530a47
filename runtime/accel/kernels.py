# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: SIM108
"""The three Triton kernels: `schedule` (work list), `attend` (partial attention), `merge`.

Split attention after T. Dao et al., "Flash-Decoding" (2023), with log2 softmax after FlashAttention
(arXiv 2205.14135); reading a shared prefix once for all its sequences after J. Juravsky et al.,
"Hydragen" (arXiv 2402.05099), on a tree as in J. Yao et al., "DeFT" (arXiv 2404.00242).

Two choices matter most on Hopper. The page id of the next tile is loaded one iteration ahead, so
that the software pipeliner spends its stages on K and V and not on the page table. And the rows of
a tile are packed densely, row `r` = query `r // GROUP`, head `r % GROUP` of the group: any ratio of
query to KV heads, also 7, fills the tile.

Shapes and strides are documented once, at `sagellm_ir.runtime.accel.attention.PrefixAttention`.
"""

import triton
import triton.language as tl

__all__ = ["attend", "merge", "schedule"]

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
NODE_FIELDS = tl.constexpr(7)


@triton.jit
def _private_begin(begin, kv_len, q_len, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """First key of the private part that any query of the sequence can see, at a page's start."""
    if WINDOW > 0:
        oldest = tl.maximum(kv_len - q_len - WINDOW + 1, 0)
        begin = tl.maximum(begin, oldest // BLOCK * BLOCK)
    return begin


@triton.jit
def schedule(
    kv_lens,
    q_start,
    begin,
    shared_slots,
    part_base,
    slots_out,
    parts_out,
    items_out,
    sizes_out,
    batch,
    item_cap,
    part_cap,
    GRID: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ITEM_COST: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Cut every sequence's private part into chunks and list them as work items.

    One program a sequence; each repeats the small sums over the whole batch, so that no program
    waits for another. The chunk length is the one of `CHUNK << 0..CHUNKS-1` (or: no cut) with the
    smallest makespan, rounds * (chunk + ITEM_COST), whose items and partials fit their buffers.
    """
    me = tl.program_id(0)
    seq = tl.arange(0, BATCH)
    live = seq < batch
    kv_len = tl.load(kv_lens + seq, mask=live, other=0)
    q_first = tl.load(q_start + seq, mask=live, other=0)
    q_len = tl.load(q_start + seq + 1, mask=live, other=0) - q_first
    first = tl.load(begin + seq, mask=live, other=0)
    shared = tl.load(shared_slots + seq, mask=live, other=0)
    first = _private_begin(first, kv_len, q_len, WINDOW, BLOCK)
    taken = tl.load(part_base)
    length = tl.where((kv_len > 0) & (q_len > 0), tl.maximum(kv_len - first, 0), 0)
    tiles = (q_len * GROUP + BM - 1) // BM
    longest = tl.max(length, 0)

    # No cut: always fits, by the check of the host.
    chunk = tl.maximum(longest, 1)
    items = tl.sum(tl.where(length > 0, tiles, 0), 0)
    rounds = (items * KV_HEADS + GRID - 1) // GRID
    best = rounds.to(tl.float32) * (chunk + ITEM_COST)
    for k in tl.static_range(CHUNKS):
        size: tl.constexpr = CHUNK << (CHUNKS - 1 - k)
        cuts = (length + size - 1) // size
        items = tl.sum(tiles * cuts, 0)
        parts = taken + tl.sum(tl.where(cuts + shared > 1, cuts * q_len * GROUP, 0), 0)
        rounds = (items * KV_HEADS + GRID - 1) // GRID
        cost = rounds.to(tl.float32) * (size + ITEM_COST)
        better = (cost < best) & (items <= item_cap) & (parts <= part_cap) & (size < longest)
        chunk = tl.where(better, size, chunk)
        best = tl.where(better, cost, best)

    cuts = (length + chunk - 1) // chunk
    slots = cuts + shared
    count = tiles * cuts
    parts = tl.where(slots > 1, cuts * q_len * GROUP, 0)
    mine = seq == me
    at = tl.sum(tl.where(seq < me, count, 0), 0)
    todo = tl.sum(tl.where(mine, count, 0), 0)
    tl.store(slots_out + me, tl.sum(tl.where(mine, slots, 0), 0))
    tl.store(parts_out + me, taken + tl.sum(tl.where(seq < me, parts, 0), 0))
    if me == 0:
        tl.store(sizes_out, tl.sum(count, 0))
        tl.store(sizes_out + 1, chunk)
    lane = tl.arange(0, 64)
    for k in range(0, todo, 64):
        item = items_out + (at + k + lane) * 2
        inside = k + lane < todo
        tl.store(item, tl.zeros([64], tl.int32) + me, mask=inside)
        tl.store(item + 1, k + lane, mask=inside)


@triton.jit
def _walk(
    acc,
    m,
    den,
    pages,
    q,
    q_sum,
    low,
    high,
    lo,
    hi,
    limit,
    table,
    k_base,
    v_base,
    ks_base,
    vs_base,
    k_page_stride,
    v_page_stride,
    ks_page_stride,
    vs_page_stride,
    k_row_stride,
    v_row_stride,
    ks_row_stride,
    vs_row_stride,
    qk_scale,
    SOFTCAP: tl.constexpr,
    KV: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over keys `[lo, hi)` in tiles of BN; row i sees keys `low[i]..high[i]`.

    `pages` holds the page id(s) of the tile at `lo`; those of the tile at `hi` are returned (a
    scalar when a tile lies in one page, else one id a key). Keys from `limit` on are never read.
    """
    key = tl.arange(0, BN)
    d = tl.arange(0, BD)
    for at in range(lo, hi, BN):
        pos = at + key
        if BLOCK % BN == 0:
            page = pages.to(tl.int64)
            row = at % BLOCK + key
            k_at = (k_base + page * k_page_stride) + (row[:, None] * k_row_stride + d[None, :])
            v_at = (v_base + page * v_page_stride) + (row[:, None] * v_row_stride + d[None, :])
            ks_at = (ks_base + page * ks_page_stride) + row * ks_row_stride
            vs_at = (vs_base + page * vs_page_stride) + row * vs_row_stride
            pages = tl.load(table + (at + BN) // BLOCK, mask=at + BN < limit, other=0)
        else:
            page = pages.to(tl.int64)
            row = pos % BLOCK
            k_at = k_base + (page * k_page_stride + row * k_row_stride)[:, None] + d[None, :]
            v_at = v_base + (page * v_page_stride + row * v_row_stride)[:, None] + d[None, :]
            ks_at = ks_base + page * ks_page_stride + row * ks_row_stride
            vs_at = vs_base + page * vs_page_stride + row * vs_row_stride
            pages = tl.load(table + (pos + BN) // BLOCK, mask=pos + BN < limit, other=0)

        # What lies behind the last key may be anything, NaN too: it must not be read.
        if MASKED:
            inside = (pos < limit)[:, None] & (d < D)[None, :]
            k = tl.load(k_at, mask=inside, other=0.0)
        elif D != BD:
            inside = (key >= 0)[:, None] & (d < D)[None, :]
            k = tl.load(k_at, mask=inside, other=0.0)
        else:
            k = tl.load(k_at)
        if UPCAST:
            k = k.to(tl.float32)
        s = tl.dot(q, tl.trans(k.to(q.dtype)))
        if KV == "int8":
            # sum_d q (k - zero) scale = (q.k - zero sum_d q) scale: no element is dequantised.
            scale = tl.load(ks_at, mask=pos < limit, other=0.0).to(tl.float32)
            zero = tl.load(ks_at + 1, mask=pos < limit, other=0.0).to(tl.float32)
            s = (s - q_sum[:, None] * zero[None, :]) * scale[None, :]
        if SOFTCAP > 0:
            # cap tanh(x / cap) = cap (1 - 2 / (exp(2 x / cap) + 1)), in base 2.
            e = tl.exp2(s * (qk_scale * (2.0 / SOFTCAP)))
            s = (1.0 - 2.0 / (e + 1.0)) * (SOFTCAP * LOG2E)
        else:
            s = s * qk_scale
        if MASKED:
            seen = (pos[None, :] <= high[:, None]) & (pos[None, :] >= low[:, None])
            s = tl.where(seen & (pos < limit)[None, :], s, NEG_INF)

        m_new = tl.maximum(m, tl.max(s, 1))
        if MASKED:
            base = tl.where(m_new == NEG_INF, 0.0, m_new)
        else:
            base = m_new
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        den = den * alpha + tl.sum(p, 1)
        m = m_new

        if MASKED or D != BD:
            v = tl.load(v_at, mask=inside, other=0.0)
        else:
            v = tl.load(v_at)
        if UPCAST:
            v = v.to(tl.float32)
        acc = acc * alpha[:, None]
        if KV == "int8":
            v_scale = tl.load(vs_at, mask=pos < limit, other=0.0).to(tl.float32)
            v_zero = tl.load(vs_at + 1, mask=pos < limit, other=0.0).to(tl.float32)
            # The correction uses the rounded weights, so rounding never multiplies `zero`.
            w = (p * v_scale[None, :]).to(q.dtype)
            acc -= tl.sum(w.to(tl.float32) * v_zero[None, :], 1)[:, None]
        else:
            w = p.to(q.dtype)
        acc = tl.dot(w, v.to(q.dtype), acc)
    return acc, m, den, pages


@triton.jit
def _position(row, row_seq, q_start, kv_lens):
    """Positions of query tokens in their sequences."""
    seq = tl.load(row_seq + row)
    return tl.load(kv_lens + seq) - tl.load(q_start + seq + 1) + row


@triton.jit
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
    begin,
    shared_slots,
    row_seq,
    nodes,
    rows,
    parts_in,
    items,
    sizes,
    qk_scale,
    out_scale,
    q_row_stride,
    q_head_stride,
    k_page_stride,
    k_row_stride,
    k_head_stride,
    v_page_stride,
    v_row_stride,
    v_head_stride,
    ks_page_stride,
    ks_row_stride,
    ks_head_stride,
    vs_page_stride,
    vs_row_stride,
    vs_head_stride,
    out_row_stride,
    out_head_stride,
    table_stride,
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
):
    """Attention of packed query rows over a chunk of keys: one (item, KV head) at a time.

    SHARED: an item is (node, chunk, tile of the queries of all the node's sequences); every query
    comes after all keys, so nothing is masked. Otherwise: (sequence, tile, chunk) of its private
    part, causal. A sequence with one slot in all gets its output here; others get partials.
    """
    d = tl.arange(0, BD)
    todo = tl.load(sizes) * KV_HEADS
    for index in range(tl.program_id(0), todo, tl.num_programs(0)):
        # Heads lie side by side in a page: neighbours in the grid read neighbouring bytes.
        head = index % KV_HEADS
        who = tl.load(items + index // KV_HEADS * 2)
        local = tl.load(items + index // KV_HEADS * 2 + 1)
        if SHARED:
            node = nodes + who * NODE_FIELDS
            owner = tl.load(node)
            lo = tl.load(node + 1)
            end = tl.load(node + 2)
            q_first = tl.load(node + 3)
            q_len = tl.load(node + 4)
            part = tl.load(node + 5)
            chunk = tl.load(node + 6)
            tiles = (q_len * GROUP + BM - 1) // BM
            # Tiles of one chunk run together: the first brings the pages to L2 for the others.
            tile = local % tiles
            cut = local // tiles
        else:
            owner = who
            end = tl.load(kv_lens + who)
            q_first = tl.load(q_start + who)
            q_len = tl.load(q_start + who + 1) - q_first
            lo = _private_begin(tl.load(begin + who), end, q_len, WINDOW, BLOCK)
            slot = tl.load(shared_slots + who)
            part = tl.load(parts_in + who)
            chunk = tl.load(sizes + 1)
            cuts = (end - lo + chunk - 1) // chunk
            tiles = (q_len * GROUP + BM - 1) // BM
            # Later tiles see more keys: longest first.
            tile = tiles - 1 - local // cuts
            cut = local % cuts

        r = tile * BM + tl.arange(0, BM)
        live = r < q_len * GROUP
        qi = tl.where(live, r // GROUP, 0)
        row = q_first + qi
        q_head = head * GROUP + r % GROUP
        low = tl.zeros([BM], tl.int32)
        if SHARED:
            row = tl.load(rows + row)
            high = tl.full([BM], 2147483647, tl.int32)
            if WINDOW > 0:
                high = _position(row, row_seq, q_start, kv_lens)
        else:
            high = end - q_len + qi
            last = tl.minimum((tile * BM + BM - 1) // GROUP, q_len - 1)
            seen_by_all = end - q_len + tile * BM // GROUP + 1
            end = end - q_len + last + 1
        if WINDOW > 0:
            low = tl.where(live, tl.maximum(high - WINDOW + 1, 0), 2147483647)

        lo += cut * chunk
        hi = tl.minimum(lo + chunk, end)
        if WINDOW > 0:
            lo = tl.maximum(lo, tl.min(low, 0) // BLOCK * BLOCK)
            free = lo
        elif SHARED:
            free = lo + tl.maximum(hi - lo, 0) // BN * BN
        else:
            free = lo + tl.maximum(tl.minimum(hi, seen_by_all) - lo, 0) // BN * BN

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
        den = tl.zeros([BM], tl.float32)
        for phase in tl.static_range(2):
            acc, m, den, pages = _walk(
                acc,
                m,
                den,
                pages,
                q,
                q_sum,
                low,
                high,
                lo if phase == 0 else free,
                free if phase == 0 else hi,
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
                phase == 1,
            )

        some = den > 0.0
        alone = False
        if not SHARED:
            alone = (slot == 0) & (cuts == 1)
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
            at = (part + cut * q_len * GROUP + tile * BM).to(tl.int64) * KV_HEADS + head
            r0 = tl.arange(0, BM)
            tl.store(lse_ptr + at + r0 * KV_HEADS, lse, mask=live)
            o = acc * (out_scale / tl.where(some, den, 1.0))[:, None]
            part_at = (part_ptr + at * D) + (r0[:, None] * (KV_HEADS * D) + d[None, :])
            tl.store(part_at, o, mask=q_mask & some[:, None])


@triton.jit
def merge(
    part_ptr,
    lse_ptr,
    out_ptr,
    sinks,
    q_start,
    row_seq,
    shared_slots,
    where_start,
    where,
    slots_in,
    parts_in,
    out_row_stride,
    out_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
    BD: tl.constexpr,
):
    """Weigh the partials of a (query row, head) by their log-sum-exp (log2).

    The first `shared_slots` lie where the host's table `where` says, the private ones at the
    sequence's own place. One slot in all: `attend` has written the output.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.load(row_seq + row)
    slots = tl.load(slots_in + seq)
    if slots != 1:
        first = tl.load(q_start + seq)
        stride = (tl.load(q_start + seq + 1) - first) * GROUP
        shared = tl.load(shared_slots + seq)
        entry = where + tl.load(where_start + seq) + (row - first) * shared
        private = tl.load(parts_in + seq) + (row - first) * GROUP - shared * stride
        d = tl.arange(0, BD)
        m = tl.full([], NEG_INF, tl.float32)
        den = tl.zeros([], tl.float32)
        acc = tl.zeros([BD], tl.float32)
        for at in range(0, slots, SLOTS):
            slot = at + tl.arange(0, SLOTS)
            part = tl.load(entry + slot, mask=slot < shared, other=0)
            part = tl.where(slot < shared, part, private + slot * stride) + head % GROUP
            part = part.to(tl.int64) * KV_HEADS + head // GROUP
            lse = tl.load(lse_ptr + part, mask=slot < slots, other=NEG_INF)
            # A slot without keys has no output: whatever lies there must not be read.
            mask = (lse > NEG_INF)[:, None] & (d < D)[None, :]
            o = tl.load(part_ptr + part[:, None] * D + d[None, :], mask=mask, other=0.0)
            m_new = tl.maximum(m, tl.max(lse, 0))
            base = tl.where(m_new == NEG_INF, 0.0, m_new)
            w = tl.exp2(lse - base)
            alpha = tl.exp2(m - base)
            den = den * alpha + tl.sum(w, 0)
            acc = acc * alpha + tl.sum(o * w[:, None], 0)
            m = m_new
        if SINKS:
            sink = tl.load(sinks + head).to(tl.float32)
            den += tl.where(m == NEG_INF, 0.0, tl.exp2(sink * LOG2E - m))
        o = acc / tl.where(den > 0.0, den, 1.0)
        at = out_ptr + row.to(tl.int64) * out_row_stride + head * out_head_stride
        tl.store(at + d, o.to(out_ptr.dtype.element_ty), mask=d < D)
