"""Plan sources: `PlanCursor` walks a finished plan, `OnlinePlanner` compiles while an engine runs.

The online planner works in epochs. An epoch compiles, by the same passes as ahead of time, what has
come and not yet finished its prompt, against what the engine's tiers hold and the seats that are
left: a fragment. Its steps are given out up to the end of its first prefills, with its block numbers
replaced by the engine's; then what it started joins the batch of requests that decode, and what it
could not start waits for an epoch after some of them have ended. So an epoch costs what has come, not
what is there.

`epochs.py` says when to compile and what, `steps.py` what the engine holds and does next.
"""

from collections.abc import Callable, Container, Sequence

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import ExecutionPlan, KVMove, PlanRequest, PlanStep
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.runtime.backend import EngineView, RequestView
from sagellm_ir.runtime.batch import Batch
from sagellm_ir.runtime.epochs import Epochs
from sagellm_ir.runtime.fragment import warm_up
from sagellm_ir.runtime.ledger import Ledger
from sagellm_ir.runtime.requests import Requests
from sagellm_ir.runtime.steps import Steps
from sagellm_ir.target import DEVICE, Target

__all__ = ["OnlinePlanner", "PlanCursor"]


class PlanCursor:
    """A finished plan as a `PlanSource`: its steps in order, whatever the engine reports."""

    def __init__(self, plan: ExecutionPlan) -> None:
        self.plan = plan
        self.position = 0
        """Steps given out."""

    def next_step(self, view: EngineView) -> PlanStep | None:
        """The next step of the plan, or None after its last."""
        if self.position == len(self.plan.steps):
            return None
        step = self.plan.steps[self.position]
        self.position += 1
        return step


class OnlinePlanner:
    """Compiles submitted requests against the engine's live state, step by step.

    Blocks of prompts stay cached after their requests end, and give way to new ones when their
    space is needed, least recently used first.

    Args:
        target: what to compile for; one worker.
        pipeline: the passes. To find cached blocks it needs `kv-reuse`.
        reserve: tokens of an answer to plan at a time; None plans all of them. With less, more
            requests run together, and a request that needs more is planned again.
        window: waiting requests to plan at a time.
        outlast: let a decode step go on when the first of its answers has ended, up to
            `max_loops`. For engines that end an answer inside a step by themselves.
        spill: keep cached blocks that give way in the host tier; any step may then have moves.

    Raises:
        SageIRError: the target has several workers, or the pipeline cannot be parsed.
    """

    def __init__(
        self,
        target: Target,
        pipeline: str = "O2",
        *,
        reserve: int | None = None,
        window: int = 256,
        outlast: bool = False,
        spill: bool = False,
    ) -> None:
        if len(target.workers) != 1:
            message = f"the online planner plans for one worker, not {len(target.workers)}"
            raise SageIRError(Diagnostic(message, help="compile ahead of time for several workers"))
        self.target = target
        passes = PassManager(Pipeline.parse(pipeline))
        self._requests = Requests(target)
        self._ledger = Ledger(target, spill)
        self._steps = Steps(target, self._requests, self._ledger, Batch(target, outlast))
        self._epochs = Epochs(self._steps, passes, reserve, window)
        warm_up(target, passes.run)

    @property
    def epochs(self) -> int:
        """Compilations so far."""
        return self._epochs.count

    @property
    def plan(self) -> ExecutionPlan | None:
        """The newest fragment, whole, in block numbers of its own, its steps numbered from 0.

        Any thread may ask: it is lowered again, as the planner itself lowers only what it runs.
        """
        newest = self._epochs.newest
        return None if newest is None else newest()

    @property
    def evicted(self) -> int:
        """Cached device blocks that gave way to new content so far."""
        return self._ledger[DEVICE].evicted

    @property
    def decoding(self) -> Container[str]:
        """The requests that decode, as planned."""
        return self._steps.batch

    def submit(self, request: PlanRequest, tokens: Sequence[int] | None = None) -> None:
        """Make a request known; it is planned from the next step on. The engine must know it too.

        Args:
            request: what to plan.
            tokens: its prompt, if it does not carry it; an array is the quickest, and is not to
                change before the request has started.

        Raises:
            SageIRError: it has no tokens, or more than the target's pool, or its id is running.
            ValueError: a token is not in `[0, 2**32)`.
        """
        tokens = request.tokens if tokens is None else tokens
        if tokens is None:
            raise _refused(request, "its token ids are missing")
        if request.id in self._requests.jobs:
            raise _refused(request, "a request of this id is running")
        tier = self.target.tier(DEVICE)
        room = (tier.blocks if tier else 0) * self.target.block_size
        need = request.prompt_len + request.max_new_tokens
        if need > room:
            raise _refused(request, f"it needs KV of {need} tokens, and the pool holds {room}")
        self._requests.add(request, tokens)
        self._epochs.come(request)

    def end(self, name: str, tokens: Sequence[int] | None = None) -> None:
        """A request has ended, in whatever way. No step is in flight that names it, but where the
        engine gives out blocks by itself, or runs what is in flight before anything that follows
        (as backends do whose `depth` is more than 1).

        Args:
            name: of the request; nothing happens when it is not known.
            tokens: its prompt and its answer, so that the blocks of the answer can be used again.
        """
        if name in self._requests.jobs:
            self._epochs.hidden.discard(name)
            self._steps.end(self._requests.end(name), tokens)

    def next_step(self, view: EngineView) -> PlanStep | None:
        """The next step, or None while there is nothing to do: submit, and ask again.

        Raises:
            SageIRError: what is under way cannot be planned within the target.
        """
        seen = {request.id: request for request in (*view.waiting, *view.running)}
        for request in view.finished:
            self.end(request.id)
        for name in self._requests.jobs.keys() - seen.keys() - self._epochs.hidden:
            self.end(name)
        self._epochs.hidden -= seen.keys()
        return self.advance(lambda name: _answered(seen[name]))

    def advance(self, answered: Callable[[str], int | None]) -> PlanStep | None:
        """`next_step` for who says `end` of what has ended, and `meet` of what has come.

        Args:
            answered: the tokens that a request's answer has so far, those of forwards in flight
                included; None where the last of them is in flight, and `end` will be said.
        """
        steps = self._steps
        steps.let_go()
        if steps.spent:
            steps.settle(answered)
        if self._epochs.is_early():
            steps.close()
        step = steps.planned()
        if step is None and self._epochs.may_start():
            self._epochs.begin()
            step = steps.planned()
        if step is None and len(steps.batch):
            step = steps.decode()
        elif step is None and steps.rows and not steps.spent:
            # Each holds what another one needs.
            for row in list(steps.rows.values()):
                steps.requeue(row.job)
            self._epochs.begin()
            step = steps.planned()
        return step or steps.changes()

    def meet(self, name: str) -> None:
        """The engine has a request that was submitted."""
        self._epochs.hidden.discard(name)

    def lost(self, name: str, answered: int) -> None:
        """The engine has dropped what it computed of a request that decodes: it is planned again."""
        row = self._steps.rows.get(name)
        if row is not None and name in self._steps.batch:
            self._steps.batch.leave(name)
            row.job.answered = answered
            self._steps.requeue(row.job)

    def look_ahead(self) -> None:
        """Take in what has ended and find what the batch shares, while a step is in flight: the next
        `advance` need not."""
        self._steps.let_go()
        self._steps.batch.groups()

    def compile_ahead(self) -> None:
        """Compile what has come, while a step is in flight: the next `advance` need not."""
        if self._epochs.is_early():
            self._steps.close()
        if self._steps.fragment is None and self._epochs.may_start():
            self._epochs.begin()

    def has_space(self) -> bool:
        """Whether the next step, as far as it is known, has room for prompts that are still to come."""
        return self._epochs.has_space()

    def step_ahead(self) -> PlanStep | None:
        """The next step while one is in flight: one of prefills without moves, or one that only decodes
        rows of a step that only decodes; else None.

        It does not count on what the step in flight gives free at its very end.
        """
        self.compile_ahead()
        fragment = self._steps.fragment
        if fragment is None and self._steps.alone and len(self._steps.batch):
            return self._steps.decode()
        step = None if fragment is None else fragment.next()
        if step is None or not step.prefill or any(isinstance(it, KVMove) for it in step.kv):
            return None
        return self._steps.planned() or self._steps.changes()


def _answered(seen: RequestView) -> int | None:
    """Tokens of an answer; None when a step in flight brings the last one."""
    return None if seen.pending and seen.generated >= seen.max_new_tokens else seen.generated


def _refused(request: PlanRequest, why: str) -> SageIRError:
    return SageIRError(Diagnostic(f"request {request.id!r} cannot be planned: {why}"))
