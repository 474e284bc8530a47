# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""`merge`: partial outputs of a query row -> its output."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from sagellm_ir.runtime.accel.kernels.common import LOG2E, NEG_INF, ROW_FIELDS

__all__ = ["merge"]


@triton.jit
def merge(
    part_ptr,
    lse_ptr,
    out_ptr,
    sinks,
    merges,
    where,
    taken,
    out_row_stride,
    out_head_stride,
    EACH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SHARED: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Weigh the partials of `EACH` heads of a query row by their log-sum-exp (log2), `WIDTH` columns.

    `merges` has a row's partials as `schedule` put them: their number, how many of them lie where
    the host's table `where` says and from which entry on, and where the private ones are. One
    partial in all: `attend` has written the output. SHARED: whether any are in the table.

    EARLY: the launch may overlap the end of `attend`, whose results are waited for here.
    """
    row = tl.program_id(0)
    block = tl.program_id(1)
    of_row = merges + row * ROW_FIELDS
    slots = tl.load(of_row)
    private = tl.load(of_row + 1)
    stride = tl.load(of_row + 2)
    shared = tl.load(of_row + 3)
    entry = where + tl.load(of_row + 4)
    if row + block == 0:  # `attend` is done with them.
        if EARLY:
            gdc_wait()
        tl.store(taken, 0)
        tl.store(taken + 1, 0)
    if slots != 1:
        d = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        if EARLY:
            gdc_wait()
        for each in range(EACH):
            head = block * EACH + each
            m = tl.full([], NEG_INF, tl.float32)
            den = tl.zeros([], tl.float32)
            acc = tl.zeros([WIDTH], tl.float32)
            for at in range(0, slots, SLOTS):
                slot = at + tl.arange(0, SLOTS)
                part = private + slot * stride
                if SHARED:
                    listed = tl.load(entry + slot, mask=slot < shared, other=0)
                    part = tl.where(slot < shared, listed, part)
                part = part + head % GROUP
                part = part.to(tl.int64) * KV_HEADS + head // GROUP
                lse = tl.load(lse_ptr + part, mask=slot < slots, other=NEG_INF)
                mask = (slot < slots)[:, None] & (d < D)[None, :]
                o = tl.load(part_ptr + part[:, None] * D + d[None, :], mask=mask, other=0.0)
                # A slot without keys has no output: whatever lies there must not count.
                o = tl.where((lse > NEG_INF)[:, None], o, 0.0)
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
            out_at = out_ptr + row.to(tl.int64) * out_row_stride + head * out_head_stride
            tl.store(out_at + d, o.to(out_ptr.dtype.element_ty), mask=d < D)
