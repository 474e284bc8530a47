"""`sage infer` on both live `sage` commands, for real."""

import argparse
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from sagellm_ir.cli import sage_plugin

ROOT = Path(__file__).parent.parent.parent
ISAGE_CLI = ("isage-cli==0.2.4.43", "isage-common==0.2.5.2")
ISAGE_CLI_NEEDS = ("typer", "rich", "pyyaml", "psutil", "requests", "httpx")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def sage_of(python: Path) -> Path:
    return python.parent / "sage"


@pytest.fixture(scope="module")
def isage() -> Path:
    """The `sage` of this environment: argparse."""
    sage = sage_of(Path(sys.executable))
    assert sage.exists(), "isage is not installed: pip install 'sagellm-ir[sage]'"
    return sage


@pytest.fixture(scope="module")
def isage_cli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `sage` of isage-cli, a Typer app, in an environment of its own: it collides with isage."""
    folder = tmp_path_factory.mktemp("isage-cli") / "venv"
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip: tuple[str | Path, ...] = (python, "-m", "pip", "install", "-q")
    if find_spec("uv"):
        pip = (sys.executable, "-m", "uv", "pip", "install", "-q", "--python", python)
    # Its own dependencies bring torch and a hundred packages that the command line does not need.
    steps = (
        (*pip, "--no-deps", *ISAGE_CLI),
        (*pip, *ISAGE_CLI_NEEDS, "--editable", ROOT),
    )
    for step in steps:
        done = run(*step)
        if done.returncode:
            pytest.skip(f"isage-cli cannot be installed here: {done.stderr.strip()[-200:]}")
    return sage_of(python)


@pytest.mark.parametrize("which", ["isage", "isage_cli"])
def test_commands_reach_us(which: str, request: pytest.FixtureRequest) -> None:
    sage = request.getfixturevalue(which)
    found = run(sage, "infer", "ir", "passes", "--json")
    assert found.returncode == 0, found.stderr
    assert '"prefix-dedup"' in found.stdout


@pytest.mark.parametrize("which", ["isage", "isage_cli"])
def test_help_options_and_exit_codes_reach_us(which: str, request: pytest.FixtureRequest) -> None:
    sage = request.getfixturevalue(which)
    shown = run(sage, "infer", "ir", "dump", "--help")
    assert shown.returncode == 0
    assert "Example: sage infer ir dump" in shown.stdout
    wrong = run(sage, "infer", "ir", "dump", "--request", "examples/tokens.jsonl", "-p", "schedul")
    assert wrong.returncode == 1
    assert "did you mean 'schedule'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert run(sage, "infer", "ir", "dump", "--nope").returncode == 2
    told = run(sage, "infer", "patches", "status", "--target", "examples")
    assert told.returncode == 1
    assert "run `sage infer patches apply` to" in told.stderr


@pytest.mark.parametrize("which", ["isage", "isage_cli"])
def test_engines_are_listed_under_llm(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`isage` has no `llm`: it is all ours. `isage-cli` has one without `engine`: that is ours."""
    sage = request.getfixturevalue(which)
    monkeypatch.setenv("SAGELLM_STATE_DIR", str(tmp_path))
    listed = run(sage, "llm", "engine", "list", "--json")
    assert (listed.returncode, listed.stdout.strip()[-2:]) == (0, "[]"), listed.stderr
    wrong = run(sage, "llm", "engine", "stop", "sagellm-7")
    assert wrong.returncode == 1
    assert "no engine 'sagellm-7' runs here" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_gateway_is_ours_where_the_name_is_free(isage: Path) -> None:
    shown = run(isage, "gateway", "start", "--help")
    assert shown.returncode == 0
    assert "Usage: sage gateway start" in shown.stdout


@pytest.mark.parametrize("which", ["isage", "isage_cli"])
def test_other_commands_still_work(which: str, request: pytest.FixtureRequest) -> None:
    sage = request.getfixturevalue(which)
    shown = run(sage, "--help")
    assert shown.returncode == 0
    assert "infer" in shown.stdout


def test_a_taken_name_is_left_alone() -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    mine = {name: commands.add_parser(name) for name in ("infer", "llm", "gateway")}
    sage_plugin.register(commands)
    assert commands.choices == mine

    app = typer.Typer()
    app.command("infer")(lambda: None)
    sage_plugin.register(app)
    assert {group.name for group in app.registered_groups} == {"llm", "gateway"}


def test_a_group_that_the_host_has_gets_what_it_lacks() -> None:
    app, llm = typer.Typer(), typer.Typer()
    llm.command("serve")(lambda: None)
    app.add_typer(llm, name="llm")
    sage_plugin.register(app)
    [theirs] = llm.registered_commands
    assert theirs.callback is not None
    assert theirs.callback.__module__ == __name__
    assert [sage_plugin.group_name(group) for group in llm.registered_groups] == ["engine"]


def test_register_never_raises(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        choices: tuple[str, ...] = ()

        def add_parser(self, *words: str, **options: object) -> None:
            raise RuntimeError("no more room")

    sage_plugin.register(Broken())
    assert "no more room" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_of_sage(
    isage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{isage.parent}:{os.environ['PATH']}")
    for _ in range(2):
        assert run(isage, "infer", "--install-completion", "bash").returncode == 0
    start = tmp_path / ".bashrc"
    assert start.read_text().count("source ") == 1
    for typed, wanted in (("sage infer ir du", "dump"), ("sage llm engine li", "list")):
        words = typed.split()
        asked = f"source {start}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
        done = run("bash", "-c", f'{asked}_sage_completion; echo "${{COMPREPLY[@]}}"')
        assert done.stdout.split() == [wanted], done.stderr
    refused = run(isage, "infer", "--install-completion", "csh")
    assert refused.returncode == 2
    assert "bash or zsh" in refused.stderr
