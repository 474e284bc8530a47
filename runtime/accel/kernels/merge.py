# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""`merge`: partial outputs of a query row -> its output."""

import triton
import triton.language as tl

from sagellm_ir.runtime.accel.kernels.common import LOG2E, NEG_INF

__all__ = ["merge"]


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
