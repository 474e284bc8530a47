# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""`schedule`: the private parts of a batch -> a balanced list of work items, on the device."""

import triton
import triton.language as tl

from sagellm_ir.runtime.accel.kernels.common import ITEM_FIELDS, ROW_FIELDS

__all__ = ["schedule"]


@triton.jit
def _makespan(
    work, items, size, grid, ITEM_COST: tl.constexpr, FEW: tl.constexpr, SLOWER: tl.constexpr
):
    """See `worklist.makespan`."""
    one = (size + ITEM_COST) * 1.0
    many = (work + items.to(tl.float32) * ITEM_COST) / grid + one * 0.5
    rounds = tl.where(items < grid, items / grid, tl.cdiv(items, grid).to(tl.float32))
    return tl.maximum(FEW * one, tl.minimum(rounds * one, many)) + SLOWER * one


@triton.jit(do_not_specialize=["batch", "item_cap", "part_cap"])
def schedule(
    kv_lens,
    q_start,
    begin,
    shared_slots,
    part_base,
    where_start,
    merges_out,
    items_out,
    sizes_out,
    taken_out,
    batch,
    item_cap,
    part_cap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ITEM_COST: tl.constexpr,
    FEW: tl.constexpr,
    SLOWER: tl.constexpr,
    CUT_COST: tl.constexpr,
    SLOT_COST: tl.constexpr,
    PART_COST: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Cut every sequence's private part into chunks and list them as work items.

    One program a sequence; each repeats the small sums over the whole batch, so that no program
    waits for another. The chunk length is the best of a list by the rule of
    `sagellm_ir.runtime.accel.worklist.makespan`, of those whose items and partials fit their buffers;
    or the one that the host asks for.
    """
    me = tl.program_id(0)
    seq = tl.arange(0, BATCH)
    live = seq < batch
    kv_len = tl.load(kv_lens + seq, mask=live, other=0)
    q_first = tl.load(q_start + seq, mask=live, other=0)
    q_len = tl.load(q_start + seq + 1, mask=live, other=0) - q_first
    first = tl.load(begin + seq, mask=live, other=0)
    shared = tl.load(shared_slots + seq, mask=live, other=0)
    if WINDOW > 0:  # Nothing before the oldest query's window is read.
        oldest = tl.maximum(kv_len - q_len - WINDOW + 1, 0)
        first = tl.maximum(first, oldest // BLOCK * BLOCK)
    taken = tl.load(part_base)
    grid = tl.load(part_base + 1)
    wanted = tl.load(part_base + 2)
    until = tl.load(part_base + 3)
    length = tl.where((kv_len > 0) & (q_len > 0), tl.maximum(kv_len - first, 0), 0)
    tiles = (q_len * GROUP + BM - 1) // BM
    longest = tl.max(length, 0)

    # No cut: always fits, by the check of the host.
    chunk = tl.maximum(longest, 1)
    items = tl.sum(tl.where(length > 0, tiles, 0), 0) * KV_HEADS
    work = tl.sum(tiles.to(tl.float32) * length, 0) * KV_HEADS
    best = _makespan(work, items, chunk, grid, ITEM_COST, FEW, SLOWER)
    merged = tl.sum(tl.where((shared > 0) & (length > 0), q_len * GROUP, 0), 0) * KV_HEADS
    best += merged.to(tl.float32) * PART_COST
    # The host has chosen a number of pieces together with the SMs for the nodes; for parts of about
    # this length.
    size = tl.cdiv(tl.cdiv(longest, tl.maximum(wanted, 1)), CHUNK) * CHUNK
    size = tl.where(wanted > 1, size, chunk)
    cuts = (length + size - 1) // size
    items = tl.sum(tiles * cuts, 0)
    parts = taken + tl.sum(tl.where(cuts + shared > 1, cuts * q_len * GROUP, 0), 0)
    obey = (wanted > 0) & (longest <= until) & (items <= item_cap) & (parts <= part_cap)
    chunk = tl.where(obey, size, chunk)
    best = tl.where(obey, -1.0, best)
    # Where nothing is merged yet, a cut means that something is.
    extra = tl.where(tl.max(shared, 0) > 0, 0, CUT_COST)
    for k in tl.static_range(CHUNKS):
        pieces = k + 2 if k < 3 else (5 + (k - 3) % 4) << ((k - 3) // 4)
        size = tl.cdiv(tl.cdiv(longest, pieces), CHUNK) * CHUNK
        cuts = (length + size - 1) // size
        items = tl.sum(tiles * cuts, 0)
        parts = taken + tl.sum(tl.where(cuts + shared > 1, cuts * q_len * GROUP, 0), 0)
        cost = _makespan(work, items * KV_HEADS, size, grid, ITEM_COST, FEW, SLOWER)
        cost += extra + SLOT_COST * tl.max(cuts, 0)
        cost += (parts - taken).to(tl.float32) * (KV_HEADS * PART_COST)
        better = (cost < best) & (items <= item_cap) & (parts <= part_cap) & (size < longest)
        chunk = tl.where(better, size, chunk)
        best = tl.where(better, cost, best)

    cuts = (length + chunk - 1) // chunk
    slots = cuts + shared
    count = tiles * cuts
    parts = tl.where(slots > 1, cuts * q_len * GROUP, 0)
    mine = seq == me
    at = tl.sum(tl.where(seq < me, count, 0), 0)
    part = taken + tl.sum(tl.where(seq < me, parts, 0), 0)
    my_slots = tl.sum(tl.where(mine, slots, 0), 0)
    if me == 0:
        tl.store(sizes_out, tl.sum(count, 0))
        tl.store(sizes_out + 1, chunk)
        tl.store(taken_out, 0)
        tl.store(taken_out + 1, 0)

    todo = tl.sum(tl.where(mine, count, 0), 0)
    my_tiles = tl.sum(tl.where(mine, tiles, 0), 0)
    end = tl.sum(tl.where(mine, kv_len, 0), 0)
    start = tl.sum(tl.where(mine, first, 0), 0)
    q_at = tl.sum(tl.where(mine, q_first, 0), 0)
    q_count = tl.sum(tl.where(mine, q_len, 0), 0)
    my_shared = tl.sum(tl.where(mine, shared, 0), 0)
    entry = tl.load(where_start + me)
    stride = q_count * GROUP
    lane = tl.arange(0, 64)
    for k in range(0, q_count, 64):
        local = k + lane
        inside = local < q_count
        of_row = merges_out + (q_at + local) * ROW_FIELDS
        same = tl.zeros([64], tl.int32)
        tl.store(of_row, same + my_slots, mask=inside)
        tl.store(of_row + 1, part + local * GROUP - my_shared * stride, mask=inside)
        tl.store(of_row + 2, same + stride, mask=inside)
        tl.store(of_row + 3, same + my_shared, mask=inside)
        tl.store(of_row + 4, entry + local * my_shared, mask=inside)
    for k in range(0, todo, 64):
        local = k + lane
        inside = local < todo
        # Tiles of one chunk are neighbours, as in the host's list.
        cut = local // tl.maximum(my_tiles, 1)
        lo = start + cut * chunk
        item = items_out + (at + local) * ITEM_FIELDS
        same = tl.zeros([64], tl.int32)
        tl.store(item, same + me, mask=inside)
        tl.store(item + 1, lo, mask=inside)
        tl.store(item + 2, lo + chunk, mask=inside)
        tl.store(item + 3, same + end, mask=inside)
        tl.store(item + 4, same + q_at, mask=inside)
        tl.store(item + 5, same + q_count, mask=inside)
        # Later tiles see more keys: longest first.
        tl.store(item + 6, my_tiles - 1 - local % tl.maximum(my_tiles, 1), mask=inside)
        tl.store(item + 7, tl.where(my_slots > 1, part + cut * q_count * GROUP, -1), mask=inside)
