"""The `sagellm-ir` command. `main` runs it; `app` is what hosts mount."""

import sys
from collections.abc import Sequence
from importlib import metadata
from io import TextIOWrapper
from typing import Annotated

import typer

from sagellm_ir.cli import backend, config, explain, gateway, ir, llm, patches, plan, run, schema
from sagellm_ir.cli.help import Group, flag
from sagellm_ir.runtime.native import set_defaults

__all__ = ["app", "main"]

app = typer.Typer(
    name="sagellm-ir",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile LLM requests to execution plans, inspect them, and run them.",
    epilog="run --prompt 'What is the capital of France?'",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sagellm-ir {metadata.version('sagellm-ir')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        flag("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


app.add_typer(ir.app)
plan.add_to(app)
run.add_to(app)
explain.add_to(app)
app.add_typer(backend.app)
app.add_typer(patches.app)
app.add_typer(schema.app)
app.add_typer(config.app)
app.add_typer(llm.app)
app.add_typer(gateway.app)


def _show_all_signs() -> None:
    """Where a stream is not UTF-8: a terminal shows `?` for what it lacks, a file or pipe gets UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, TextIOWrapper) or stream.encoding.lower() == "utf-8":
            continue
        if stream.isatty():
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8")


def main(
    argv: Sequence[str] | None = None, program: str = "sagellm-ir", commands: typer.Typer = app
) -> int:
    """Runs the command line.

    Args:
        argv: the words after the command's name; None takes them from `sys.argv`.
        program: how the user called it, for usage messages.
        commands: all of them, or a group that a host has mounted.

    Returns:
        0 when all went well, 1 for bad input, 2 for wrong usage, 130 when interrupted.
    """
    set_defaults()
    _show_all_signs()
    try:
        commands(args=list(sys.argv[1:] if argv is None else argv), prog_name=program)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
