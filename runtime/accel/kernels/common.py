# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Constants and arithmetic that the kernels share."""

import triton
import triton.language as tl

__all__ = ["LOG2E", "NEG_INF", "private_begin"]

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def private_begin(begin, kv_len, q_len, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """First key of the private part that any query of the sequence can see, at a page's start."""
    if WINDOW > 0:
        oldest = tl.maximum(kv_len - q_len - WINDOW + 1, 0)
        begin = tl.maximum(begin, oldest // BLOCK * BLOCK)
    return begin
