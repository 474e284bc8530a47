"""`verify`: runs the laws, first those of form, then those that rely on them."""

from sagellm_ir.graph import IRGraph
from sagellm_ir.verify import copies, declarations, schedule, service, sharing, spans, structure
from sagellm_ir.verify.report import VerifyError, broken

__all__ = ["verify"]

_MEANING = (*spans.LAWS, *sharing.LAWS, *copies.LAWS, *service.LAWS, *schedule.STAGE_LAWS)


def verify(graph: IRGraph, known: IRGraph | None = None) -> None:
    """Checks all laws of a graph's stage.

    Args:
        graph: what to check.
        known: an earlier graph that was verified; what the graph has in common with it is not
            checked again, where that saves time.

    Raises:
        VerifyError: with a diagnostic for each finding. When form is broken (names, operands,
            declarations), the laws that rely on it are not checked, and those of a schedule
            only when all others hold.
    """
    if known is graph or (known is not None and _is_only_placed(graph, known)):
        return
    requests = () if known and _same_requests(graph, known) else declarations.REQUEST_LAWS
    timing = schedule.SCHEDULE_LAWS if graph.stage == "scheduled" else ()
    form = (*declarations.LAWS, *requests, *structure.LAWS)
    for laws in (form, _MEANING, timing):
        if found := list(broken(graph.columns, laws)):
            raise VerifyError(*found)


def _same_requests(graph: IRGraph, known: IRGraph) -> bool:
    same_size = known.target.block_size == graph.target.block_size
    return known.requests is graph.requests and same_size


def _is_only_placed(graph: IRGraph, known: IRGraph) -> bool:
    """Whether a built graph became a placed one without a change: a single worker need not be
    named, so no law tells the two apart."""
    fields = ("target", "requests", "nodes", "cache", "loops")
    same = all(getattr(graph, name) is getattr(known, name) for name in fields)
    stages = (known.stage, graph.stage)
    return same and stages == ("built", "placed") and len(graph.target.workers) == 1
