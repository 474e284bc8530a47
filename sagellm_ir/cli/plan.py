"""`plan`: compile requests, or a graph, to a plan; show it as a table and a timeline."""

import shutil
import sys
from typing import Annotated

import typer

from sagellm_ir.cli import shared, watching
from sagellm_ir.cli.compiling import Compilation, choose_pipeline, start
from sagellm_ir.cli.timeline import timeline
from sagellm_ir.text import parse_graph

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    shared.command(app, "plan", example="-r examples/chat_shared_document.jsonl -o plan.json")(plan)


def plan(
    request: shared.Requests = None,
    graph: Annotated[
        str | None, typer.Option("--ir", metavar="FILE", help="A graph as text, instead.")
    ] = None,
    level: shared.Level = 2,
    pipeline: shared.PipelineText = None,
    target: shared.TargetName = "cpu",
    overrides: shared.Overrides = None,
    tokenizer: shared.TokenizerName = "auto",
    skip_bad: shared.SkipBad = False,
    limit: shared.Limit = None,
    max_new: shared.MaxNew = 128,
    timing: watching.ShowTiming = False,
    stats: watching.ShowStatistics = False,
    as_json: shared.AsJson = False,
    output: shared.Out = None,
) -> None:
    """Compile requests to a plan. Shows it, or writes it to a file that `run --plan` takes."""
    from sagellm_ir.lowering.render import plan_text
    from sagellm_ir.lowering.serial import plan_to_json, save_plan

    if (request is None) == (graph is None):
        raise typer.BadParameter("give either --request or --ir")
    watch = watching.Watch.of(timing, stats, False, None, watching.REPRO)
    passes = choose_pipeline(level, pipeline)
    if graph is not None:
        compilation = Compilation((), parse_graph(shared.read_input(graph), graph), {})
    else:
        compilation = start(request, target, overrides, tokenizer, skip_bad, limit, max_new)
    made = compilation.plan(compilation.run_passes(passes, *watch.instruments))
    watch.report()
    if output is not None:
        save_plan(made, output)
        shared.note(f"wrote {output}")
    elif as_json:
        shared.emit(plan_to_json(made))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    shared.emit(f"{plan_text(made, width)}\n\n{timeline(made)}")
