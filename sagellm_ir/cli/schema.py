"""`schema dump`: the JSON Schema of plans."""

import typer

from sagellm_ir.cli import shared

__all__ = ["app"]

app = typer.Typer(
    name="schema",
    no_args_is_help=True,
    help="The JSON Schema of plans.",
    epilog="Example: sage infer schema dump > plan.schema.json",
)


@app.callback()
def _group() -> None:
    """The JSON Schema of plans."""


@shared.command(app, "dump", example="schema dump -o plan.schema.json")
def dump(output: shared.Out = None) -> None:
    """Print the JSON Schema (draft 2020-12) that plan files follow."""
    from sagellm_ir.lowering.schema import plan_schema

    shared.emit_json(plan_schema(), output)
