"""Mounts our commands as `sage infer` on whichever `sage` command is installed.

Two live forms load the entry-point group `sage.cli.plugins`: `isage` hands over argparse
sub-parsers and dies with every plug-in error, `isage-cli` hands over a Typer app. `register` serves
both, takes a name only where it is free, and never raises. It imports our commands only when
`sage infer` is called (argparse), or when Typer is loaded anyway.
"""

import argparse
import sys
from typing import Any

__all__ = ["register"]

NAME = "infer"
SUMMARY = "Compile LLM requests to execution plans, inspect them, and run them."
NEVER_TYPED = "\x00"


def register(host: Any) -> None:
    """Add `infer` to a host's commands.

    Args:
        host: the argparse sub-parsers action of `isage`, or the Typer app of `isage-cli`.
    """
    try:
        if hasattr(host, "add_parser"):
            _mount_on_argparse(host)
        elif hasattr(host, "add_typer"):
            _mount_on_typer(host)
    except Exception as error:  # noqa: BLE001  (a plug-in must not take all of `sage` down)
        print(f"sagellm-ir: 'sage {NAME}' is not available: {error}", file=sys.stderr)


def _mount_on_argparse(host: Any) -> None:
    if NAME in host.choices:
        return
    # No word is an option to this parser, so all of them, `--help` too, reach our own command.
    parser = host.add_parser(NAME, help=SUMMARY, add_help=False, prefix_chars=NEVER_TYPED)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    parser.set_defaults(_handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    from sagellm_ir.cli.main import main

    return main(arguments.words, program=f"sage {NAME}")


def _mount_on_typer(host: Any) -> None:
    from sagellm_ir.cli.main import app

    taken = {group.name for group in host.registered_groups}
    taken |= {command.name for command in host.registered_commands}
    if NAME not in taken:
        host.add_typer(app, name=NAME, help=SUMMARY)
