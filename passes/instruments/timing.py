"""`Timing`: how long each pass took."""

from typing import TYPE_CHECKING

from attrs import field, frozen

from sagellm_ir.passes.instruments.base import Instrument, PassRun
from sagellm_ir.passes.pipeline import print_pass

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Timing", "TimingRow"]


@frozen
class TimingRow:
    """One pass; times are wall seconds."""

    spec: str
    """The pass as pipeline text."""
    seconds: float
    verify_seconds: float
    nodes: int
    """Nodes of the input."""
    changed: bool


@frozen
class Timing(Instrument):
    """Collects a row for each pass."""

    rows: list[TimingRow] = field(factory=list)

    def after(self, run: PassRun) -> None:
        spec, nodes = print_pass(run.item), len(run.graph.nodes)
        row = TimingRow(spec, run.seconds, run.verify_seconds, nodes, run.changed)
        self.rows.append(row)

    def table(self) -> "Table":
        """The rows and their sum, for a rich console."""
        from rich.table import Table

        table = Table("pass", "changed", title="Time of passes")
        for column in ("nodes", "ms", "verify ms"):
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(
                row.spec,
                "yes" if row.changed else "no",
                str(row.nodes),
                f"{row.seconds * 1e3:.2f}",
                f"{row.verify_seconds * 1e3:.2f}",
            )
        total = (
            sum(row.seconds for row in self.rows),
            sum(row.verify_seconds for row in self.rows),
        )
        table.add_section()
        table.add_row("total", "", "", *(f"{seconds * 1e3:.2f}" for seconds in total))
        return table
