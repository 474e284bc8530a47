"""Runs the command line in process, as `sagellm-ir` would be run."""

from pathlib import Path
from typing import Protocol

import pytest
from attrs import frozen

from sagellm_ir.cli.main import main

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@frozen
class Ran:
    code: int
    out: str
    err: str


class Cli(Protocol):
    def __call__(self, *words: str) -> Ran: ...


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("ir", "dump", ...)` -> exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(EXAMPLES.parent)

    def run(*words: str) -> Ran:
        capsys.readouterr()
        code = main(words)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
