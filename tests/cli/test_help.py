"""Every command has help that ends with an example, and the example is a command that exists."""

import shlex
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from typing import Any

import pytest
from typer.main import get_command

from sagellm_ir.__main__ import run
from sagellm_ir.cli.main import app
from tests.cli.conftest import Cli


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


PATHS = sorted(commands(get_command(app)))


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_ends_with_an_example(path: tuple[str, ...], cli: Cli) -> None:
    ran = cli(*path, "--help")
    assert ran.code == 0
    last = ran.out.strip().splitlines()[-1]
    assert last.strip().startswith("Example: sagellm-ir ")
    words = shlex.split(last.partition("Example: sagellm-ir ")[2])
    assert tuple(words[: len(path)]) == path
    assert any(tuple(words[: len(known)]) == known for known in PATHS if known)


def test_a_flag_shows_no_value_to_give(cli: Cli) -> None:
    (line,) = (line for line in cli("plan", "--help").out.splitlines() if "--json" in line)
    assert "<" not in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ir", "dmp"), "Did you mean 'dump'"),
        (("nope",), "No such command"),
        (("ir", "dump", "-O7"), "-O"),
        (("ir", "dump", "-r", "examples/tokens.jsonl", "--stage", "lowered"), "no 'lowered'"),
        (("ir", "dump", "-r", "examples/tokens.jsonl", "--format", "jsn"), "did you mean 'json'?"),
        (("run",), "give one of"),
        (("plan",), "give either"),
        (("ir", "opt", "x.ir"), "give --pipeline or -O"),
        (("ir", "passes", "--diff"), "add --request"),
    ],
)
def test_wrong_usage_exits_2(words: tuple[str, ...], message: str, cli: Cli) -> None:
    ran = cli(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err


class _Interrupts(MetaPathFinder):
    """Ctrl-C while the commands are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "sagellm_ir.cli.main":
            raise KeyboardInterrupt


def test_ctrl_c_while_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "sagellm_ir.cli.main")
    monkeypatch.setattr(sys, "meta_path", [_Interrupts(), *sys.meta_path])
    assert run() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("sagellm-ir ")
