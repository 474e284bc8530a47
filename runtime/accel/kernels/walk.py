# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: SIM108
"""`walk`: online softmax of packed query rows over a range of keys, the inner loop of `attend`."""

import triton
import triton.language as tl

from sagellm_ir.runtime.accel.kernels.common import LOG2E, NEG_INF

__all__ = ["walk"]


@triton.jit
def walk(
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
    k_page_stride: tl.constexpr,
    v_page_stride: tl.constexpr,
    ks_page_stride: tl.constexpr,
    vs_page_stride: tl.constexpr,
    k_row_stride: tl.constexpr,
    v_row_stride: tl.constexpr,
    ks_row_stride: tl.constexpr,
    vs_row_stride: tl.constexpr,
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
    scalar when a tile lies in one page, else one id a key). What lies behind `limit` may be
    anything, NaN too. `den` is `[BM]`, or `[BM, BN]` to be summed by the caller.
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

        # Small tiles are bound by memory: nothing is read behind the last key, which of 129 keys in
        # tiles of 32 would be a fifth of all. Others, and int8, have no registers to spare.
        if MASKED and KV != "int8" and q.shape[0] <= 32:
            k = tl.load(k_at, mask=(pos < limit)[:, None] & (d < D)[None, :], other=0.0)
        elif D != BD:
            k = tl.load(k_at, mask=(key >= 0)[:, None] & (d < D)[None, :], other=0.0)
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
        unit = qk_scale
        if SOFTCAP > 0:
            # cap tanh(x / cap) = cap (1 - 2 / (exp(2 x / cap) + 1)), in base 2.
            e = tl.exp2(s * (qk_scale * (2.0 / SOFTCAP)))
            s = 1.0 - 2.0 / (e + 1.0)
            unit = SOFTCAP * LOG2E
        if MASKED:
            seen = (pos[None, :] <= high[:, None]) & (pos[None, :] >= low[:, None])
            s = tl.where(seen & (pos < limit)[None, :], s, NEG_INF)

        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        if MASKED:
            base = tl.where(m_new == NEG_INF, 0.0, m_new)
        else:
            base = m_new
        p = tl.exp2(s * unit - base[:, None])
        alpha = tl.exp2(m - base)
        if len(den.shape) == 2:
            den = den * alpha[:, None] + p
        else:
            den = den * alpha + tl.sum(p, 1)
        m = m_new

        # Scores of what lies behind the last key are masked above, but 0 * NaN is NaN.
        if MASKED:
            v = tl.load(v_at, mask=(pos < limit)[:, None] & (d < D)[None, :], other=0.0)
        elif D != BD:
            v = tl.load(v_at, mask=(key >= 0)[:, None] & (d < D)[None, :], other=0.0)
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
