"""Mounts our commands on whichever `sage` command is installed: `sage infer`, and `sage llm` and
`sage gateway` where those names are free.

Two live forms load the entry-point group `sage.cli.plugins`: `isage` hands over argparse
sub-parsers and dies with every plug-in error, `isage-cli` hands over a Typer app. `register` serves
both, takes a name only where it is free, and never raises. It imports our commands only when
`sage infer` is called (argparse), or when Typer is loaded anyway.
"""

import argparse
import functools
import sys
from typing import Any

__all__ = ["group_name", "register"]

SUMMARIES = {
    "infer": "Compile LLM requests to execution plans, inspect them, and run them.",
    "llm": "Serve models: engines with an OpenAI API.",
    "gateway": "One address in front of a fleet of engines.",
}
NEVER_TYPED = "\x00"


def register(host: Any) -> None:
    """Add our groups to a host's commands.

    Args:
        host: the argparse sub-parsers action of `isage`, or the Typer app of `isage-cli`.
    """
    try:
        for name in SUMMARIES:
            if hasattr(host, "add_parser"):
                _mount_on_argparse(host, name)
            elif hasattr(host, "add_typer"):
                _mount_on_typer(host, name)
    except Exception as error:  # noqa: BLE001  (a plug-in must not take all of `sage` down)
        print(f"sagellm-ir: 'sage {name}' is not available: {error}", file=sys.stderr)


def _group(name: str) -> Any:
    """The Typer app that a name stands for."""
    from sagellm_ir.cli import gateway, llm, main

    return {"infer": main.app, "llm": llm.app, "gateway": gateway.app}[name]


def _mount_on_argparse(host: Any, name: str) -> None:
    if name in host.choices:
        return
    # No word is an option to this parser, so all of them, `--help` too, reach our own command.
    parser = host.add_parser(name, help=SUMMARIES[name], add_help=False, prefix_chars=NEVER_TYPED)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    parser.set_defaults(_handler=functools.partial(_run, name))


def _run(name: str, arguments: argparse.Namespace) -> int:
    from sagellm_ir.cli.completion import complete
    from sagellm_ir.cli.main import main

    if (code := complete(arguments.words)) is not None:
        return code
    return main(arguments.words, program=f"sage {name}", commands=_group(name))


def _mount_on_typer(host: Any, name: str) -> None:
    ours = _group(name)
    taken = {group.name: group.typer_instance for group in host.registered_groups}
    if name not in taken:
        if name not in {command.name for command in host.registered_commands}:
            host.add_typer(ours, name=name, help=SUMMARIES[name])
        return
    # The host has such a group: what it lacks is added to it, what it has stays.
    theirs = taken[name]
    names = {found.name for found in (*theirs.registered_groups, *theirs.registered_commands)}
    theirs.registered_groups += [g for g in ours.registered_groups if group_name(g) not in names]
    theirs.registered_commands += [c for c in ours.registered_commands if c.name not in names]


def group_name(group: Any) -> str:
    """A mounted group's name; not given at mounting, it is the group's own."""
    return str(group.name or group.typer_instance.info.name)
