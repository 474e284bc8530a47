"""`bisect`: which rewrite of a pipeline makes the result wrong (an idea of LLVM's OptBisect)."""

from collections.abc import Callable

from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.manager import PassError, PassManager
from sagellm_ir.passes.pipeline import Pipeline

__all__ = ["bisect"]


def bisect(pipeline: Pipeline, graph: IRGraph, is_bad: Callable[[IRGraph], bool]) -> int | None:
    """The smallest number of rewrites with which the result is bad; None when it is never bad.

    With one rewrite less the result is good, so the last of them is the culprit; 0 says that the
    fault is in no rewrite. A pass that fails is bad too. Like any bisection it expects that what is
    bad stays bad with more rewrites; if not, it finds one place where good turns bad.

    Args:
        pipeline: what to run.
        graph: its input.
        is_bad: judges a result.
    """

    def bad(rewrites: int | None) -> bool:
        try:
            return is_bad(PassManager(pipeline, max_rewrites=rewrites).run(graph))
        except PassError:
            return True

    if not bad(None):
        return None
    if bad(0):
        return 0
    high = 1
    while not bad(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bad(middle) else (middle, high)
    return high
