"""A third party's pass that fails: found by its entry point, reproduced by the command printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMMAND = Path(sys.executable).parent / "sagellm-ir"
PASS = """\
from typing import ClassVar

from attrs import frozen
from sagellm_ir.passes.base import Pass


@frozen
class Fragile(Pass):
    \"\"\"Gives up at its third rewrite.\"\"\"

    name: ClassVar[str] = "fragile"
    limit: int = 2

    def run(self, graph, ctx):
        for number in range(5):
            if ctx.may_rewrite() and number >= self.limit:
                raise RuntimeError("one rewrite too many")
        return graph
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages with one that brings a pass."""
    folder = tmp_path / "site"
    info = folder / "fragile-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "fragile.py").write_text(PASS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sagellm_ir.passes]\nfragile = fragile:Fragile\n")
    return folder


def test_the_printed_command_fails_again(site: Path, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "400"}
        command = [str(COMMAND), *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    graph, repro = tmp_path / "graph.ir", tmp_path / "repro.ir"
    built = run("ir", "dump", "-r", "examples/tokens.jsonl", "--stage", "built", "-o", str(graph))
    assert built.returncode == 0, built.stderr
    failed = run("ir", "opt", "-p", "canonicalize,fragile{limit=1}", str(graph),
                 "--repro", str(repro))  # fmt: skip
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "RuntimeError: one rewrite too many" in failed.stderr
    assert "Traceback" not in failed.stderr
    printed = re.search(r"to see it fail again: sagellm-ir (.*)", failed.stderr)
    assert printed is not None
    again = run(*shlex.split(printed[1]))
    assert again.returncode == 1
    assert "RuntimeError: one rewrite too many" in again.stderr
    assert run(*shlex.split(printed[1]), "--bisect").stdout == "fails from rewrite 2 on\n"


@pytest.mark.parametrize("command", [("ir", "dump"), ("plan",), ("run", "--backend", "simulator")])
def test_commands_that_take_requests_leave_a_reproducer_too(
    site: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "400"}
    requests = str(ROOT / "examples" / "tokens.jsonl")
    words = [str(COMMAND), *command, "-r", requests, "-p", "canonicalize,fragile"]
    failed = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "to see it fail again: sagellm-ir ir repro repro.ir" in failed.stderr
    assert "fragile" in (tmp_path / "repro.ir").read_text().splitlines()[0]
