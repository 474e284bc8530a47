"""`backend ...`: which engines this machine can run plans on, and whether they do it right."""

from typing import Annotated

import typer
from attrs import asdict

from sagellm_ir.cli import shared
from sagellm_ir.cli.help import flag, group
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.engines import BACKENDS, find_backend

__all__ = ["app"]

app = group("backend", "The engines that can run a plan.", example="list")


@shared.command(app, "list", example="--json")
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


@shared.command(app, "test", example="--all")
def check_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An engine.")] = "embedded",
    everything: Annotated[
        bool, flag("--all", help="One plan on every engine that is here, compared.")
    ] = False,
    model: Annotated[
        str, typer.Option(metavar="NAME|FOLDER|FILE", help="With --all: the model.")
    ] = "smollm2-135m",
    python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE=PATH", help="With --all: the interpreter that has an engine; repeated."
        ),
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Run random requests through every preset and eviction policy; compare with plain decoding.

    With --all: one plan on every engine, each in a process of its own, in float32. Tokens, prefill chunks in
    their order and shared blocks are compared with the embedded engine's. LMDeploy, where there is a GPU, has
    16 bits only: there near ties may fall differently, so equal answers are counted.
    """
    if everything:
        _all(model, dict(map(_pair, python or ())), as_json)
        return
    find_backend(name).require()
    if name != "embedded":
        raise SageIRError(
            Diagnostic(f"engine {name!r} is tested beside others only", help="backend test --all")
        )
    from sagellm_ir.runtime.selftest import self_test

    with shared.working(f"testing {name}"):
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


def _pair(text: str) -> tuple[str, str]:
    kind, equals, path = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--python: {text!r} is not ENGINE=PATH")
    return kind, path


def _all(model: str, pythons: dict[str, str], as_json: bool) -> None:
    """One plan on every engine: the table, and what differs below it."""
    from sagellm_ir.runtime.agreement import Agreement, absent, agreement

    def tokens(result: Agreement) -> str:
        if result.tokens is not None:
            return "equal" if result.tokens else "DIFFER"
        share = f"{result.equal_answers} of {result.answers} equal in {result.dtype}"
        return share if result.answers else "-"

    with shared.working("running one plan on every engine"):
        results = list(agreement(model, pythons=pythons))
    if as_json:
        shared.emit_json([{**asdict(r), "agrees": r.agrees} for r in results])
    else:
        shared.print_table(
            f"One plan on {len(results)} engines",
            ("engine", "forwards", "prefill chunks", "blocks moved", "tokens", "chunks, sharing"),
            (
                (r.engine, r.forwards, r.chunks, r.moved_blocks, tokens(r),
                 "DIFFER" if r.differences else "equal")
                for r in results
            ),
        )  # fmt: skip
        for result in results:
            for difference in result.differences:
                shared.note(f"{result.engine}: {difference}")
    for name, why in absent(pythons).items():
        shared.note(f"{name} is not here: {why}")
    if not all(result.agrees for result in results):
        raise typer.Exit(1)
