"""`patches ...`: our patches to LMDeploy, applied to, undone in, or looked for in a source tree."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from attrs import asdict

from sagellm_ir.cli import shared
from sagellm_ir.cli.help import group

if TYPE_CHECKING:
    from sagellm_ir.runtime.engines.lmdeploy.patching import PatchStatus

__all__ = ["app"]

app = group("patches", "The patches that let plans drive LMDeploy's scheduler.", example="status")

TargetTree = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="DIR|installed",
        help="A folder that holds lmdeploy/, or the installed distribution. Default: `patches.target` of "
        "the configuration, else the submodule when it is checked out, else the pinned wheel's "
        "Python files in build/lmdeploy.",
    ),
]


@shared.command(app, "apply", example="--target installed")
def apply(target: TargetTree = None, as_json: shared.AsJson = False) -> None:
    """Patch a tree: all files or none."""
    from sagellm_ir.runtime.engines.lmdeploy import patching

    _run(patching.apply, target, as_json)


@shared.command(app, "revert", example="--target installed")
def revert(target: TargetTree = None, as_json: shared.AsJson = False) -> None:
    """Undo `patches apply`."""
    from sagellm_ir.runtime.engines.lmdeploy import patching

    _run(patching.revert, target, as_json)


@shared.command(app, "status", example="--json")
def status(target: TargetTree = None, as_json: shared.AsJson = False) -> None:
    """How far a tree is patched."""
    from sagellm_ir.runtime.engines.lmdeploy import patching

    _run(patching.status, target, as_json)


def _run(action: "Callable[[str | None], PatchStatus]", target: str | None, as_json: bool) -> None:
    from sagellm_ir.runtime.config import load_config

    found = action(target or load_config().patches.target)
    if as_json:
        data: dict[str, Any] = asdict(found)
        shared.emit_json(data | {"root": str(found.root)})
        return
    shared.emit(f"LMDeploy {found.version} in {found.root}: {found.state}")
    if found.changed:
        shared.note(f"{found.changed} files changed")
    for file in found.files:
        if file.state in ("unknown", "missing"):
            shared.note(f"{file.path}: {file.state}")
