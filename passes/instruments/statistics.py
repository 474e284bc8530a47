"""`Statistics`: did my pass fire? What each pass counted, and how the graph's size changed."""

from collections import Counter
from typing import TYPE_CHECKING

from attrs import field, frozen

from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.instruments.base import Instrument, PassRun
from sagellm_ir.passes.pipeline import print_pass

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Statistics", "StatisticsRow", "op_delta"]


def op_delta(before: IRGraph, after: IRGraph) -> dict[str, int]:
    """By how much the number of nodes of each kind changed; kinds that did not are left out."""
    delta = Counter(node.kind for node in after.nodes)
    delta.subtract(Counter(node.kind for node in before.nodes))
    return {kind: count for kind, count in sorted(delta.items()) if count}


@frozen
class StatisticsRow:
    """What one pass did."""

    spec: str
    """The pass as pipeline text."""
    changed: bool
    counts: dict[str, int]
    """Counters of the pass."""
    ops: dict[str, int]
    """Change of the number of nodes, by kind."""


@frozen
class Statistics(Instrument):
    """Collects a row for each pass."""

    rows: list[StatisticsRow] = field(factory=list)

    def after(self, run: PassRun) -> None:
        spec, ops = print_pass(run.item), op_delta(run.graph, run.result)
        self.rows.append(StatisticsRow(spec, run.changed, dict(run.counts), ops))

    def table(self) -> "Table":
        """The rows, for a rich console."""
        from rich.table import Table

        table = Table("pass", "changed", "did", "nodes", title="Statistics of passes")
        for row in self.rows:
            did = ", ".join(f"{count} {what}" for what, count in row.counts.items())
            ops = ", ".join(f"{kind} {count:+d}" for kind, count in row.ops.items())
            table.add_row(row.spec, "yes" if row.changed else "no", did, ops)
        return table
