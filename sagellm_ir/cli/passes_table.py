"""What `ir passes` prints: the passes there are, and what each of them did to some requests."""

import inspect
from typing import Any

import attrs
from rich.console import Console

from sagellm_ir.cli import shared
from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.base import Pass
from sagellm_ir.passes.instruments import Diff, Statistics, Timing
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import PRESETS, Pipeline
from sagellm_ir.passes.registry import find_pass, pass_names

__all__ = ["print_passes", "print_what_passes_did"]


def _options(cls: type[Pass]) -> dict[str, str]:
    """Options with type and default, as text."""
    options = {}
    for option in attrs.fields(cls):
        kind = getattr(option.type, "__name__", None) or str(option.type)
        options[option.name] = f"{kind} = {option.default}"
    return options


def _describe(name: str) -> dict[str, Any]:
    cls = find_pass(name)
    return {
        "name": name,
        "summary": cls.summary(),
        "needs": list(cls.needs),
        "gives": cls.gives,
        "options": _options(cls),
        "law": inspect.getdoc(cls) or "",
    }


def print_passes(full: bool, as_json: bool) -> None:
    """All passes and presets; `full` adds options and laws."""
    passes = [_describe(name) for name in pass_names()]
    if as_json:
        shared.emit_json({"passes": passes, "presets": PRESETS})
        return
    if full:
        console = Console(highlight=False, soft_wrap=True)
        for item in passes:
            stages = f"{' or '.join(item['needs'])} -> {item['gives'] or 'the same'}"
            console.print(f"[bold]{item['name']}[/bold]  [dim]{stages}[/dim]")
            console.print("  " + item["law"].replace("\n", "\n  "), markup=False)
            for name, text in item["options"].items():
                console.print(f"  option {name}: {text}", markup=False)
            console.print()
    else:
        shared.print_table(
            "Passes", ("name", "what it does"), ((item["name"], item["summary"]) for item in passes)
        )
    shared.print_table("Presets", ("name", "pipeline"), PRESETS.items())


def print_what_passes_did(graph: IRGraph, pipeline: Pipeline, diff: bool, as_json: bool) -> None:
    """Runs the passes and prints, for each, counters, change of size, and lines if asked for."""
    timing, statistics = Timing(), Statistics()
    text: list[str] = []
    watching = (timing, statistics, Diff(text.append)) if diff else (timing, statistics)
    PassManager(pipeline, watching).run(graph)
    rows = [
        {
            "pass": did.spec,
            "changed": did.changed,
            "did": did.counts,
            "nodes": did.ops,
            "ms": round(took.seconds * 1e3, 3),
            **({"diff": lines} if (lines := text[index] if diff else None) is not None else {}),
        }
        for index, (did, took) in enumerate(zip(statistics.rows, timing.rows, strict=True))
    ]
    if as_json:
        shared.emit_json(rows)
        return
    shared.emit("".join(text)) if text else None
    console = Console(highlight=False)
    console.print(statistics.table())
    console.print(timing.table())
