"""Every command has help that ends with an example, and the example is a command that exists."""

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

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
    assert last.strip().startswith("Example: sage ")
    words = shlex.split(last.partition("Example: sage ")[2])
    words = words[1:] if words[0] == "infer" else words
    assert any(tuple(words[: len(known)]) == known for known in PATHS if known)


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
    ],
)
def test_wrong_usage_exits_2(words: tuple[str, ...], message: str, cli: Cli) -> None:
    ran = cli(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("sagellm-ir ")
