"""`Reproducer`: when a pass fails, a file that makes it fail again.

It is the graph before the failing pass, with that one pass in the first line:

    // RUN: --pipeline 'prefix-dedup{min_tokens=64}'
    sagellm_ir 1
    ...
"""

import shlex
from pathlib import Path

from attrs import frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.files import read_text, write_atomic
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import Location
from sagellm_ir.passes.instruments.base import Instrument, PassRun
from sagellm_ir.passes.pipeline import Pipeline, print_pass
from sagellm_ir.text import parse_graph, print_graph

__all__ = ["RUN", "Reproducer", "read_reproducer", "read_run_line"]

RUN = "// RUN: --pipeline "


@frozen
class Reproducer(Instrument):
    """Writes the reproducer of a failing pass."""

    path: Path

    def failed(self, run: PassRun, error: Exception) -> str:
        """Writes the file; returns how to run it."""
        line = RUN + shlex.quote(print_pass(run.item))
        write_atomic(self.path, f"{line}\n{print_graph(run.graph)}")
        return f"to see it fail again: sagellm-ir ir repro {shlex.quote(str(self.path))}"


def read_reproducer(path: Path) -> tuple[Pipeline, IRGraph]:
    """The pipeline and the graph of a reproducer.

    Raises:
        SageIRError: the file cannot be read, is too large, or is no reproducer.
    """
    text = read_text(path)
    return read_run_line(text, str(path)), parse_graph(text, str(path))


def read_run_line(text: str, file: str) -> Pipeline:
    """The pipeline named by the first line of a text.

    Raises:
        SageIRError: the line has another form, or the pipeline is wrong.
    """
    line = text.partition("\n")[0]
    try:
        words = shlex.split(line.removeprefix(RUN)) if line.startswith(RUN) else []
    except ValueError:  # a quotation mark has no partner
        words = []
    if len(words) != 1:
        message = "the first line names no pipeline"
        fix = f"begin the file with: {RUN}'canonicalize'"
        raise SageIRError(Diagnostic(message, loc=Location(file, 1), window=f"  {line}", help=fix))
    return Pipeline.parse(words[0])
