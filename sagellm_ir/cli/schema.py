"""`schema ...`: JSON Schemas of the types that engines exchange, and their page in docs/."""

from typing import Annotated

import typer

from sagellm_ir.cli import shared
from sagellm_ir.cli.help import group

__all__ = ["app"]

app = group(
    "schema",
    "JSON Schemas of plans, graphs, configuration and protocols.",
    example="dump ExecutionPlan > plan.schema.json",
)


@shared.command(app, "dump", example="ExecutionPlan -o plan.schema.json")
def dump(
    name: Annotated[
        str | None, typer.Argument(metavar="[TYPE]", help="One type, for example ExecutionPlan.")
    ] = None,
    output: shared.Out = None,
) -> None:
    """Print JSON Schema (draft 2020-12): of one type, or of all of them under `$defs`."""
    from sagellm_ir.runtime.protocols.catalogue import every_schema, schema

    shared.emit_json(every_schema() if name is None else schema(name), output)


@shared.command(app, "docs", example="-o docs/protocols.md")
def docs(output: shared.Out = None) -> None:
    """Print what all types and their fields mean, as Markdown."""
    from sagellm_ir.runtime.protocols.catalogue import document

    shared.emit(document(), output)
