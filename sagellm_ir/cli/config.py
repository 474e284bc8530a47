"""`config ...`: what a deployment is configured to, and by what."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagellm_ir.cli import shared
from sagellm_ir.cli.help import flag, group

if TYPE_CHECKING:
    from sagellm_ir.runtime.config import Configuration

__all__ = ["app"]

app = group(
    "config", "The configuration: sage_llm.yaml and the environment.", example="show --origin"
)


@shared.command(app, "show", example="--origin")
def show(
    file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Read this file. Default: what SAGELLM_CONFIG names, else the packaged one.",
        ),
    ] = None,
    origin: Annotated[bool, flag("--origin", help="Say where each value is from.")] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Print every value that holds, as YAML; secrets are masked."""
    from sagellm_ir.runtime.config import read_config

    found = read_config(file)
    if origin:
        rows = list(found.rows())
        if as_json:
            shared.emit_json(
                [dict(zip(("name", "value", "origin"), row, strict=True)) for row in rows]
            )
        else:
            shared.print_table("Configuration", ("name", "value", "from"), map(_as_text, rows))
    elif as_json:
        shared.emit_json(_tree(found))
    else:
        import yaml

        shared.emit(yaml.safe_dump(_tree(found), sort_keys=False, allow_unicode=True))


def _as_text(row: tuple[str, Any, str]) -> tuple[str, str, str]:
    import json

    name, value, origin = row
    return name, value if isinstance(value, str) else json.dumps(value), origin


def _tree(found: "Configuration") -> dict[str, Any]:
    """The values as nested mappings: a file that reads to the same configuration."""
    tree: dict[str, Any] = {}
    for name, value, _ in found.rows():
        *sections, last = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = list(value) if isinstance(value, tuple) else value
    return tree
