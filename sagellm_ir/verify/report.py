"""`Finding`: a broken law. `VerifyError` carries all of them, each shown among its neighbours."""

from collections.abc import Callable, Iterable, Iterator

from attrs import frozen

from sagellm_ir.columns import Columns
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.text.printer import node_text

__all__ = ["Finding", "Law", "VerifyError", "broken", "diagnose"]

_PER_LAW = 100
"""Findings of one law that are shown; the others are counted."""
_NEIGHBOURS = 3
_WIDTH = 160


class VerifyError(SageIRError):
    """A graph breaks laws of the IR. `diagnostics` holds what was found."""


@frozen
class Finding:
    """One place where a law is broken."""

    message: str
    node: int | None = None
    """Index of the node it is about."""
    request: RequestDecl | None = None
    """The request it is about, when it is about no node."""
    help: str = ""


Law = Callable[[Columns], Iterable[Finding]]


def broken(columns: Columns, laws: Iterable[Law]) -> Iterator[Diagnostic]:
    """What the laws find."""
    for law in laws:
        findings = list(law(columns))
        for finding in findings[:_PER_LAW]:
            yield diagnose(columns.graph, finding)
        if len(findings) > _PER_LAW:
            more = len(findings) - _PER_LAW
            yield Diagnostic(f"{more} more findings like the last one are not shown")


def diagnose(graph: IRGraph, finding: Finding) -> Diagnostic:
    """The finding with its place in the graph."""
    if finding.node is not None:
        loc = graph.nodes[finding.node].loc
        return Diagnostic(
            finding.message, loc, window=_window(graph, finding.node), help=finding.help
        )
    loc = finding.request.loc if finding.request else None
    return Diagnostic(finding.message, loc, help=finding.help)


def _window(graph: IRGraph, at: int) -> str:
    """The node with an arrow, between its neighbours."""
    first = max(0, at - _NEIGHBOURS)
    lines = []
    for i, node in enumerate(graph.nodes[first : at + _NEIGHBOURS + 1], first):
        text = node_text(node)
        text = text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ..."
        lines.append(f"{'-->' if i == at else '   '} {text}")
    return "\n".join(lines)
