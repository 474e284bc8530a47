"""`Dump`: the graph after each pass, as numbered files with an index."""

from pathlib import Path

from attrs import field, frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.files import write_atomic
from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.instruments.base import Instrument, PassRun
from sagellm_ir.passes.instruments.statistics import op_delta
from sagellm_ir.passes.pipeline import print_pass
from sagellm_ir.text import print_graph

__all__ = ["Dump"]

INPUT = "00_input.ir"


@frozen
class Dump(Instrument):
    """Writes `00_input.ir`, `01_<pass>.ir`, ... and `index.md` into a folder.

    A pass that changed nothing gets no file, only its line of the index. Each file begins with the
    command that makes it again from the file before. Only these names are written over.
    """

    folder: Path
    index: list[str] = field(init=False, factory=list)
    """Lines of `index.md`."""
    last: list[str] = field(init=False, factory=lambda: [INPUT])
    """Files written so far."""

    def before(self, run: PassRun) -> None:
        if self.index:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make the folder {self.folder}: {error.strerror}"
            raise SageIRError(Diagnostic(message)) from error
        self._write(INPUT, print_graph(run.graph))
        self.index.append("# Graph after each pass\n")
        self.index.append("| | pass | graph | nodes | change | ms |\n|-|-|-|-|-|-|")
        self._add(0, "(input)", INPUT, run.graph, "")

    def after(self, run: PassRun) -> None:
        spec = print_pass(run.item)
        if not run.changed:
            self._add(run.index, f"`{spec}`", "", run.result, "unchanged", run.seconds)
            return
        name = f"{run.index:02d}_{run.item.name}.ir"
        command = f"// sagellm-ir ir opt --pipeline '{spec}' {self.last[-1]}\n"
        self._write(name, command + print_graph(run.result))
        self.last.append(name)
        delta = ", ".join(
            f"{kind} {count:+d}" for kind, count in op_delta(run.graph, run.result).items()
        )
        self._add(run.index, f"`{spec}`", name, run.result, delta or "attributes", run.seconds)

    def failed(self, run: PassRun, error: Exception) -> str:
        """Notes the failure in the index."""
        self._add(run.index, f"`{print_pass(run.item)}`", "", run.graph, "**failed**")
        return f"the graphs before it are in {self.folder / 'index.md'}"

    def _add(
        self, number: int, what: str, name: str, graph: IRGraph, change: str, seconds: float = 0.0
    ) -> None:
        link = f"[{name}]({name})" if name else ""
        cells = (
            f"{number:02d} | {what} | {link} | {len(graph.nodes)} | {change} | {seconds * 1e3:.2f}"
        )
        self.index.append(f"| {cells} |")
        self._write("index.md", "\n".join(self.index) + "\n")

    def _write(self, name: str, text: str) -> None:
        write_atomic(self.folder / name, text)
