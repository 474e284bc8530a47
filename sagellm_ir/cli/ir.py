"""`ir ...`: look at graphs and rewrite them, text in and text out."""

from pathlib import Path
from typing import Annotated

import typer

from sagellm_ir.cli import shared, watching
from sagellm_ir.cli.compiling import choose_pipeline, start
from sagellm_ir.cli.help import flag, group
from sagellm_ir.cli.passes_table import print_passes, print_what_passes_did
from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.passes.bisect import bisect as find_rewrite
from sagellm_ir.passes.instruments import graph_diff, op_delta, read_reproducer
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.picture import to_dot, to_mermaid
from sagellm_ir.serial import graph_to_json
from sagellm_ir.text import parse_graph, print_graph
from sagellm_ir.verify import verify

__all__ = ["app"]

app = group(
    "ir",
    "Show, check and rewrite graphs.",
    example="dump --request examples/chat_shared_document.jsonl -O2",
)

STAGES = ("built", "optimised", "scheduled", "plan")
FORMATS = ("text", "json", "dot", "mermaid")

Provenance = Annotated[
    bool, flag("--provenance", help="Show where each node was written and what made it.")
]
Graph = Annotated[str, typer.Argument(metavar="FILE", help="A graph as text; `-` for stdin.")]


@shared.command(
    app, "dump", example="--request examples/chat_shared_document.jsonl -O2 --stage built"
)
def dump(
    request: shared.Requests = None,
    level: shared.Level = 2,
    pipeline: shared.PipelineText = None,
    stage: Annotated[
        str, typer.Option(metavar="|".join(STAGES), help="How far to compile.")
    ] = "optimised",
    form: Annotated[
        str, typer.Option("--format", "-f", metavar="|".join(FORMATS), help="How to print it.")
    ] = "text",
    target: shared.TargetName = "cpu",
    overrides: shared.Overrides = None,
    tokenizer: shared.TokenizerName = "auto",
    provenance: Provenance = False,
    skip_bad: shared.SkipBad = False,
    limit: shared.Limit = None,
    max_new: shared.MaxNew = 128,
    dump_dir: watching.DumpDir = None,
    repro: watching.ReproFile = watching.REPRO,
    output: shared.Out = None,
) -> None:
    """Turn requests into a graph and print it, at any stage on its way to a plan."""
    shared.one_of("--stage", stage, STAGES)
    shared.one_of("--format", form, FORMATS)
    compilation = start(request, target, overrides, tokenizer, skip_bad, limit, max_new)
    passes = choose_pipeline(level, pipeline)
    watch = watching.Watch.of(False, False, False, dump_dir, repro).instruments
    if stage == "plan":
        plan = compilation.plan(compilation.run_passes(passes, *watch))
        shared.emit(_print_plan(plan, form), output)
        return
    graph = compilation.graph
    if stage == "optimised":
        graph = compilation.run_passes(passes, *watch, until="schedule")
    elif stage == "scheduled":
        graph = compilation.run_passes(passes, *watch)
    shared.emit(_print(graph, form, provenance), output)


def _print(graph: IRGraph, form: str, provenance: bool) -> str:
    if form == "json":
        return graph_to_json(graph)
    if form == "dot":
        return to_dot(graph)
    if form == "mermaid":
        return to_mermaid(graph)
    return print_graph(graph, provenance=provenance)


def _print_plan(plan: ExecutionPlan, form: str) -> str:
    from sagellm_ir.lowering.picture import plan_dot
    from sagellm_ir.lowering.render import plan_mermaid, plan_text
    from sagellm_ir.lowering.serial import plan_to_json

    if form == "json":
        return plan_to_json(plan)
    if form == "mermaid":
        return plan_mermaid(plan)
    if form == "dot":
        return plan_dot(plan)
    return plan_text(plan)


@shared.command(app, "passes", example="--request examples/tokens.jsonl --diff")
def passes(
    show: Annotated[bool, flag("--show", help="Without --request: with options and laws.")] = False,
    request: shared.Requests = None,
    level: shared.Level = 2,
    pipeline: shared.PipelineText = None,
    diff: Annotated[
        bool, flag("--diff", help="With --request: what each pass changed, line by line.")
    ] = False,
    target: shared.TargetName = "cpu",
    overrides: shared.Overrides = None,
    tokenizer: shared.TokenizerName = "auto",
    skip_bad: shared.SkipBad = False,
    limit: shared.Limit = None,
    max_new: shared.MaxNew = 128,
    as_json: shared.AsJson = False,
) -> None:
    """List the passes and presets or, with requests, show what each pass does to them."""
    if not request:
        if diff:
            raise typer.BadParameter("--diff shows what passes do to requests: add --request FILE")
        print_passes(full=show, as_json=as_json)
        return
    compilation = start(request, target, overrides, tokenizer, skip_bad, limit, max_new)
    print_what_passes_did(compilation.graph, choose_pipeline(level, pipeline), diff, as_json)


@shared.command(app, "opt", example="-p canonicalize,prefix-dedup graph.ir")
def opt(
    graph: Graph = "-",
    level: Annotated[
        int | None, typer.Option("-O", metavar="0..3", min=0, max=3, help="Pipeline preset.")
    ] = None,
    pipeline: shared.PipelineText = None,
    max_rewrites: Annotated[
        int | None, typer.Option(min=0, help="Allow this many rewrites in all, to bisect a fault.")
    ] = None,
    timing: watching.ShowTiming = False,
    stats: watching.ShowStatistics = False,
    print_diff: watching.PrintDiff = False,
    dump_dir: watching.DumpDir = None,
    repro: watching.ReproFile = watching.REPRO,
    provenance: Provenance = False,
    as_json: shared.AsJson = False,
    output: shared.Out = None,
) -> None:
    """Run passes over a graph: text in, text out."""
    if level is None and pipeline is None:
        raise typer.BadParameter("give --pipeline or -O")
    passes = choose_pipeline(level or 0, pipeline)
    parsed = parse_graph(shared.read_input(graph), graph)
    watch = watching.Watch.of(timing, stats, print_diff, dump_dir, repro)
    result = PassManager(passes, watch.instruments, max_rewrites).run(parsed)
    watch.report()
    shared.emit(_print(result, "json" if as_json else "text", provenance), output)


@shared.command(app, "verify", example="graph.ir")
def check(graph: Graph = "-", as_json: shared.AsJson = False) -> None:
    """Check a graph against all laws."""
    parsed = parse_graph(shared.read_input(graph), graph)
    verify(parsed)
    if as_json:
        shared.emit_json({"valid": True, "stage": parsed.stage, "nodes": len(parsed.nodes)})
        return
    shared.note(f"{graph}: a valid {parsed.stage} graph of {len(parsed.nodes)} nodes")


@shared.command(app, "diff", example="before.ir after.ir")
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A graph as text.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    exit_code: Annotated[
        bool, flag("--exit-code", help="Exit with 1 when they differ, as git diff does.")
    ] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Show how two graphs differ, formatting and comments aside."""
    left, right = (parse_graph(shared.read_input(path), path) for path in (before, after))
    equal, text = left == right, graph_diff(left, right, (before, after))
    delta = op_delta(left, right)
    if as_json:
        shared.emit_json({"equal": equal, "nodes": delta, "diff": text})
    elif equal:
        shared.note("the graphs are equal")
    else:
        shared.emit(text)
        counts = ", ".join(f"{kind} {more:+d}" for kind, more in delta.items())
        shared.note(f"nodes: {counts or 'the same number of each kind'}")
    if exit_code and not equal:
        raise typer.Exit(1)


@shared.command(app, "repro", example="repro.ir")
def repro(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What a failing pass left behind.")],
    bisect: Annotated[
        bool, flag("--bisect", help="Find the first rewrite that makes it fail.")
    ] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Run the pass of a reproducer on its graph again."""
    pipeline, graph = read_reproducer(file)
    if not bisect:
        result = PassManager(pipeline).run(graph)
        shared.emit(_print(result, "json" if as_json else "text", provenance=False))
        return
    number = find_rewrite(pipeline, graph, lambda result: False)
    if as_json:
        shared.emit_json({"fails_from_rewrite": number})
    else:
        shared.emit("it does not fail" if number is None else f"fails from rewrite {number} on")
