"""`run`: compile requests and run them, or run a plan file."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from attrs import asdict, frozen
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sagellm_ir.cli import shared
from sagellm_ir.cli.compiling import (
    choose_pipeline,
    choose_target,
    compile_requests,
    read_requests,
)
from sagellm_ir.cli.help import flag
from sagellm_ir.cli.run_engines import ENGINES, EngineChoice, MakeEngine, opened
from sagellm_ir.cli.simulate import simulate
from sagellm_ir.cli.watching import REPRO
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.passes.instruments import Reproducer
from sagellm_ir.request import ChatPrompt, Message, Request
from sagellm_ir.requests import Loaded
from sagellm_ir.runtime.engines import find_backend

if TYPE_CHECKING:
    from sagellm_ir.lowering.plan import ExecutionPlan
    from sagellm_ir.runtime.backend import TokenEvent
    from sagellm_ir.runtime.running import RunReport

__all__ = ["add_to"]

TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        metavar="NAME|FILE",
        help="What to compile for; default: cpu, vllm-cpu or h100, by the backend.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    shared.command(app, "run", example="--prompt 'What is the capital of France?'")(run)


@frozen
class _Job:
    """What to run, what makes the engine for it, and where to write what the engine ran."""

    plan: "ExecutionPlan"
    make: MakeEngine
    trace: Path | None


def run(
    request: shared.Requests = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A question, instead of a file; repeated."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="A plan file, instead.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER|FILE",
            help="The model; default: the target's, if it is here. lmdeploy's must be named.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bfloat16|float16",
            help="Arithmetic; default: float32, and bfloat16 for lmdeploy, which knows 16 bits only.",
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(metavar="|".join(ENGINES), help="The engine that runs the plan.")
    ] = "embedded",
    kv_schema: shared.KVSchema = "preset=auto",
    level: shared.Level = 2,
    pipeline: shared.PipelineText = None,
    target: TargetName = None,
    overrides: shared.Overrides = None,
    tokenizer: shared.TokenizerName = "auto",
    skip_bad: shared.SkipBad = False,
    limit: shared.Limit = None,
    max_new: shared.MaxNew = 128,
    ignore_eos: Annotated[
        bool, flag("--ignore-eos", help="Answers are as long as planned.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write what the engine ran, as JSON lines."),
    ] = None,
    as_json: shared.AsJson = False,
    output: shared.Out = None,
) -> None:
    """Compile requests to a plan and run it, or run a plan file; print the answers."""
    if sum(bool(source) for source in (request, prompt, plan)) != 1:
        raise typer.BadParameter("give one of --request, --prompt and --plan")
    shared.one_of("--backend", backend, ENGINES)
    kind = find_backend(backend)
    choice = EngineChoice(backend, model, kind.dtype(dtype), kv_schema, ignore_eos)
    kind.require()
    if plan is not None:
        job = _load(plan, choice, trace)
    else:
        loaded = (
            Loaded(_questions(prompt, max_new))
            if prompt
            else read_requests(request, skip_bad, limit, max_new)
        )
        name = target or kind.target
        shape, make = choice.load(choose_target(name, overrides).model)
        fitted = choose_target(name, overrides, shape)
        compilation = compile_requests(loaded, fitted, tokenizer if model is None else model)
        passes = choose_pipeline(level, pipeline)
        made = compilation.plan(compilation.run_passes(passes, Reproducer(REPRO)))
        job = _Job(made, make, trace)
    if backend == "simulator":
        simulate(job.plan, as_json, output, trace)
        return
    report = _watch(job, quiet=as_json or output is not None)
    if as_json or output is not None:
        shared.emit_json(_as_data(report), output)
    _summarise(report)


def _questions(prompts: list[str], max_new: int) -> tuple[Request, ...]:
    return tuple(
        Request(f"r{index}", prompt=ChatPrompt((Message("user", text),)), max_new_tokens=max_new)
        for index, text in enumerate(prompts)
    )


def _load(path: Path, choice: EngineChoice, trace: Path | None) -> _Job:
    """A plan file, checked before anything runs."""
    from sagellm_ir.lowering.serial import load_plan
    from sagellm_ir.lowering.verify_plan import verify_plan

    made = load_plan(path)
    verify_plan(made)
    target = made.target
    try:
        _, make = choice.load(target.model)
    except SageIRError as error:
        message = f"{path} is for target {target.name!r} with model {target.model.name!r}, which "
        help_ = "compile the requests for a target of this machine (`sagellm-ir plan --target cpu`)"
        if choice.model is None:
            help_ += f", or say where {target.model.name!r} is with --model"
        notes = tuple(str(found.message) for found in error.diagnostics)
        diagnostic = Diagnostic(f"{message}cannot run here", notes=notes, help=help_)
        raise SageIRError(diagnostic) from error
    return _Job(made, make, trace)


def _watch(job: _Job, quiet: bool) -> "RunReport":
    """Runs the plan with a progress bar; prints answers as they end, a single one as it grows."""
    from sagellm_ir.runtime.running import run_plan
    from sagellm_ir.runtime.trace import recording

    answers = _Answers(live=len(job.plan.requests) == 1, quiet=quiet)
    columns = (TextColumn("running"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=shared.stderr(), transient=True, disable=answers.live)
    with ExitStack() as stack:
        engine = stack.enter_context(opened(job.make(job.plan.target)))
        stack.enter_context(recording(engine, job.plan.target.block_size, job.trace))
        stack.enter_context(bar)
        task = bar.add_task("tokens", total=sum(r.max_new_tokens for r in job.plan.requests))

        def on_token(event: "TokenEvent") -> None:
            bar.advance(task)
            answers.add(event)

        return run_plan(engine, job.plan, on_token)


class _Answers:
    """Prints answers on stdout: a single one token by token, several each when it has ended."""

    def __init__(self, live: bool, quiet: bool) -> None:
        self.live = live
        self.quiet = quiet
        self._text: dict[str, str] = {}

    def add(self, event: "TokenEvent") -> None:
        """One more token."""
        if self.quiet:
            return
        if self.live:
            print(event.text, end="\n" if event.finish else "", flush=True)
            return
        text = self._text.pop(event.request, "") + event.text
        if event.finish:
            print(f"[{event.request}] {text.strip() or '(no text)'}\n", flush=True)
        else:
            self._text[event.request] = text


def _as_data(report: "RunReport") -> dict[str, object]:
    answers = [asdict(answer) for answer in report.answers.values()]
    return {"answers": answers, "summary": report.summary()}


def _summarise(report: "RunReport") -> None:
    """The savings and speeds, on stderr."""
    figures = report.summary()
    table = Table(title="Summary", title_justify="left", show_header=False)
    table.add_row("requests", f"{figures['requests']:.0f}")
    table.add_row(
        "prompt tokens",
        f"{report.prompt_tokens}, of which {report.computed_tokens} computed "
        f"and {report.saved_tokens} shared ({report.hit_ratio:.1%})",
    )
    table.add_row("new tokens", f"{report.generated}, by a plan of {report.steps} steps")
    table.add_row("blocks moved", f"{report.moved_blocks}")
    table.add_row(
        "time to first token", f"{figures['ttft_mean']:.3f} s mean, {figures['ttft_max']:.3f} s max"
    )
    table.add_row(
        "speed",
        f"{figures['tokens_per_second']:.1f} new tokens/s, "
        f"{figures['prompt_tokens_per_second']:.1f} prompt tokens/s, {report.seconds:.2f} s in all",
    )
    shared.stderr().print(table)
