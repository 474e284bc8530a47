"""`schema dump`: the JSON Schemas of what we read and write."""

from typing import Annotated

import typer

from sagellm_ir.cli import shared

__all__ = ["app"]

app = typer.Typer(
    name="schema",
    no_args_is_help=True,
    help="JSON Schemas of plans and graphs.",
    epilog="Example: sage infer schema dump > plan.schema.json",
)


@shared.command(app, "dump", example="schema dump --of plan -o plan.schema.json")
def dump(
    of: Annotated[str, typer.Option(metavar="plan|graph", help="Which schema.")] = "plan",
    output: shared.Out = None,
) -> None:
    """Print a JSON Schema (draft 2020-12)."""
    from sagellm_ir.lowering.schema import graph_schema, plan_schema

    shared.one_of("--of", of, ("plan", "graph"))
    shared.emit_json(plan_schema() if of == "plan" else graph_schema(), output)
