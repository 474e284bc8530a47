"""`explain`: what the plan does with one request, and why."""

import typer

from sagellm_ir.cli import shared

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
