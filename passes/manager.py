"""`PassManager`: runs a pipeline, verifies the graph before and after every pass, always."""

import time
from collections.abc import Sequence

from attrs import evolve, frozen

from sagellm_ir.collecting import no_collections
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.instruments.base import Instrument, PassRun
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.passes.registry import PASSES, find_pass
from sagellm_ir.verify import verify

__all__ = ["PassError", "PassManager", "check_stages"]


class PassError(SageIRError):
    """A pass crashed, or made a graph that breaks the laws: a bug of the pass, not of its input."""


@frozen
class PassManager:
    """Runs passes in the order given; never adds, drops or moves one."""

    pipeline: Pipeline
    instruments: Sequence[Instrument] = ()
    max_rewrites: int | None = None
    """Rewrites all passes together may make; None is no limit. See `PassContext.may_rewrite`."""

    @no_collections()
    def run(self, graph: IRGraph) -> IRGraph:
        """The graph after all passes.

        Raises:
            SageIRError: the input is invalid, a pass is at a stage it cannot work at (found before
                the first pass runs), or the target cannot do what the graph asks for.
            PassError: a pass crashed or made an invalid graph.
        """
        check_stages(self.pipeline.passes, graph.stage)
        verify(graph)
        budget = self.max_rewrites
        for index, item in enumerate(self.pipeline, 1):
            graph, rewrites = self._run_one(PassRun(index, item, graph), PassContext(budget))
            budget = None if budget is None else budget - rewrites
        return graph

    def _run_one(self, run: PassRun, ctx: PassContext) -> tuple[IRGraph, int]:
        """The graph after one pass, and its rewrites."""
        for instrument in self.instruments:
            instrument.before(run)
        started = time.perf_counter()
        try:
            result = run.item.run(run.graph, ctx)
        except SageIRError:
            raise  # the target cannot do what the graph asks for
        except Exception as error:
            raise self._failure(run, error) from error
        passed = time.perf_counter()
        try:
            _check_stage(run, result)
            verify(result, known=run.graph)
        except SageIRError as error:
            raise self._failure(run, error) from error
        run = evolve(
            run,
            result=result,
            counts=dict(ctx.counts),
            rewrites=ctx.rewrites,
            seconds=passed - started,
            verify_seconds=time.perf_counter() - passed,
        )
        for instrument in reversed(self.instruments):
            instrument.after(run)
        return result, ctx.rewrites

    def _failure(self, run: PassRun, error: Exception) -> PassError:
        """What to raise for a bug of a pass, with what the instruments say about it."""
        notes = [instrument.failed(run, error) for instrument in reversed(self.instruments)]
        cause = str(error) if isinstance(error, SageIRError) else f"{type(error).__name__}: {error}"
        return PassError(
            Diagnostic(
                f"{_place(run.index, run.item)} failed on a valid graph",
                notes=(cause, *(note for note in notes if note)),
                help="this is a bug of the pass: report it together with the graph it failed on",
            )
        )


def _place(index: int, item: Pass) -> str:
    return f"pass {item.name!r} (number {index} of the pipeline)"


def check_stages(pipeline: Sequence[Pass], stage: str) -> str:
    """The stage in which the pipeline leaves a graph that enters in `stage`.

    Raises:
        SageIRError: some pass would get a graph of a stage it cannot work at.
    """
    for index, item in enumerate(pipeline, 1):
        if stage not in item.needs:
            wanted = " or ".join(item.needs)
            message = f"{_place(index, item)} needs a {wanted} graph, but gets a {stage} one"
            raise SageIRError(Diagnostic(message, help=_stage_help(pipeline[:index], stage)))
        stage = item.gives or stage
    return stage


def _stage_help(upto: Sequence[Pass], stage: str) -> str:
    """Which pass to add before the last one of `upto`, or where to move that one."""
    item = upto[-1]
    for cls in map(find_pass, PASSES):
        if cls.gives in item.needs and stage in cls.needs:
            return f"add {cls.name!r} before it"
    late = [earlier.name for earlier in upto if earlier.gives == stage]
    return f"move it before {late[0]!r}" if late else f"start from a {item.needs[0]} graph"


def _check_stage(run: PassRun, result: object) -> None:
    """Raises SageIRError when a result is not what the pass declares."""
    if not isinstance(result, IRGraph):
        raise SageIRError(Diagnostic(f"the pass returned {type(result).__name__}, not an IRGraph"))
    stage = run.item.gives or run.graph.stage
    if result.stage != stage:
        raise SageIRError(
            Diagnostic(f"the pass says its result is {stage}, but it is {result.stage}")
        )
