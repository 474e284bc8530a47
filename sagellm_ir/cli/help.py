"""What is said under the name that the user typed: help that ends with an example, and messages."""

import re
from copy import copy
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["Command", "Group", "as_called", "flag", "group"]

_COMMAND = re.compile(r"\bsagellm-ir (?=[a-z])")


def as_called(text: str, called: str) -> str:
    """A message, which names commands as `sagellm-ir ...`: inside SAGE these are `sage infer ...`.

    Args:
        called: what the user typed: `sagellm-ir run`, `sage llm serve`.
    """
    return _COMMAND.sub("sage infer ", text) if called.startswith("sage ") else text


class Command(TyperCommand):
    """A command whose epilog is an example: the words behind its own name."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The same commands are `sagellm-ir ...` and `sage infer ...`: only the call tells which."""
        shown = copy(self)
        shown.epilog = f"Example: {ctx.command_path} {self.epilog}"
        TyperCommand.format_help(shown, ctx, formatter)


class Group(TyperGroup):
    """A group whose epilog is an example: the words behind its own name."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """See `Command`."""
        shown = copy(self)
        shown.epilog = f"Example: {ctx.command_path} {self.epilog}"
        TyperGroup.format_help(shown, ctx, formatter)


def group(name: str, help: str, *, example: str) -> typer.Typer:
    """A group of commands; without a command it shows its help.

    Args:
        example: a command of it, with its options.
    """
    made = typer.Typer(
        name=name,
        cls=Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help=help,
        epilog=example,
    )

    @made.callback(help=help)
    def _stay_a_group() -> None:
        """Typer makes a group of one command that command."""

    return made


def flag(*names: str, help: str, **more: Any) -> Any:
    """An option without a value: its help shows no type to give."""
    return typer.Option(*names, help=help, metavar="", **more)
