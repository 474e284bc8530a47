"""`Diff`: what each pass changed, as a unified diff of the text."""

import difflib
from collections.abc import Callable

from attrs import frozen

from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.instruments.base import Instrument, PassRun
from sagellm_ir.passes.pipeline import print_pass
from sagellm_ir.text import print_graph

__all__ = ["Diff", "graph_diff"]


def graph_diff(
    before: IRGraph,
    after: IRGraph,
    labels: tuple[str, str] = ("before", "after"),
    context: int = 1,
) -> str:
    """A unified diff of two graphs, headed by the labels; empty when they print the same.

    Quadratic in the number of changed lines at worst: meant for graphs that a person looks at.
    """
    old, new = (print_graph(graph).splitlines() for graph in (before, after))
    lines = difflib.unified_diff(old, new, *labels, n=context, lineterm="")
    return "".join(f"{line}\n" for line in lines)


@frozen
class Diff(Instrument):
    """Writes a heading and a diff for each pass that changed something."""

    write: Callable[[str], object]
    """Where to: `sys.stderr.write`, a list's `append`, ..."""
    context: int = 1
    """Unchanged lines around each change."""

    def after(self, run: PassRun) -> None:
        spec = print_pass(run.item)
        if run.changed:
            self.write(graph_diff(run.graph, run.result, ("before", spec), self.context))
        else:
            self.write(f"=== {spec}: unchanged\n")
