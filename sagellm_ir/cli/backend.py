"""`backend ...`: which engines this machine can run plans on, and whether they do it right."""

from typing import Annotated

import typer
from attrs import asdict

from sagellm_ir.cli import shared
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.engines import BACKENDS, find_backend

__all__ = ["app"]

app = typer.Typer(
    name="backend",
    no_args_is_help=True,
    help="The engines that can run a plan.",
    epilog="Example: sage infer backend list",
)


@shared.command(app, "list", example="backend list --json")
def list_backends(as_json: shared.AsJson = False) -> None:
    """Which engines are here, and how to get the others."""
    rows = [
        {
            "name": backend.name,
            "summary": backend.summary,
            "ready": not backend.missing,
            "missing": backend.missing,
            "install": backend.install,
        }
        for backend in BACKENDS
    ]
    if as_json:
        shared.emit_json(rows)
        return
    shared.print_table(
        "Engines",
        ("name", "what it is", "ready", "to install"),
        (
            (row["name"], row["summary"], "yes" if row["ready"] else "no", row["install"])
            for row in rows
        ),
    )


@shared.command(app, "test", example="backend test embedded")
def check_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An engine.")] = "embedded",
    as_json: shared.AsJson = False,
) -> None:
    """Run random requests through every preset and eviction policy; compare with plain decoding."""
    find_backend(name).require()
    if name == "simulator":
        raise SageIRError(
            Diagnostic("the simulator makes no real tokens to compare", help="test 'embedded'")
        )
    from sagellm_ir.runtime.selftest import self_test

    with shared.stderr().status(f"testing {name}"):
        results = list(self_test())
    if as_json:
        shared.emit_json([asdict(result) for result in results])
    else:
        shared.print_table(
            f"Engine {name}: {results[0].requests} random requests",
            ("pipeline", "steps", "blocks moved", "prompt tokens computed", "tokens"),
            (
                (r.pipeline, r.steps, r.moved_blocks, r.computed, "equal" if r.equal else "DIFFER")
                for r in results
            ),
        )
    if not all(result.equal for result in results):
        raise typer.Exit(1)
