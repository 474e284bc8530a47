"""Plan sources: `PlanCursor` walks a finished plan, `OnlinePlanner` compiles while an engine runs.

The online planner works in epochs. An epoch is one compilation, by the same passes as ahead of
time, of everything that is not finished. It ends at the first step boundary at which the plan no
longer fits the world: requests came, or one ended early, or one needs more tokens than planned.

A request that is under way enters the next epoch as a request whose prompt is all it has so far.
Its full blocks are resident content that `kv-reuse` hits; private ids stand for blocks of
generated tokens. The block it is in the middle of is a `LiveBlock`. So nothing is computed twice
but the newest token, whose KV was still to be computed anyway. KV that was lost on the way (a
spilled unfinished block) is recomputed by an ordinary prefill.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence

from attrs import evolve

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.plan import ExecutionPlan, KVFree, PlanRequest, PlanStep
from sagellm_ir.lowering.replay import Replay
from sagellm_ir.nodes import Decode, IRNode, Prefill
from sagellm_ir.nodes.allreduce import collective
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.runtime.backend import EngineView, RequestView
from sagellm_ir.runtime.carry import Carry, Contents
from sagellm_ir.target import DEVICE, Target

__all__ = ["OnlinePlanner", "PlanCursor"]

logger = logging.getLogger(__name__)


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
            requests run together, and a request that needs more makes a new epoch.
        window: waiting requests to plan at a time.

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
    ) -> None:
        if len(target.workers) != 1:
            message = f"the online planner plans for one worker, not {len(target.workers)}"
            raise SageIRError(Diagnostic(message, help="compile ahead of time for several workers"))
        self.target = target
        self.epochs = 0
        """Compilations so far."""
        self.plan: ExecutionPlan | None = None
        """The current epoch's plan, its steps numbered from 0."""
        self._passes = PassManager(Pipeline.parse(pipeline))
        self._reserve, self._window = reserve, window
        self._contents = Contents(target)
        self._jobs = self._contents.jobs
        self._dirty = False
        self._replay: Replay | None = None
        self._position = 0
        """Steps of the current plan given out."""
        self._issued = 0
        """Steps of all plans given out."""
        self._frees: tuple[KVFree, ...] = ()

    def submit(self, request: PlanRequest, tokens: Sequence[int] | None = None) -> None:
        """Make a request known; it is planned from the next step on. The engine must know it too.

        Args:
            request: what to plan.
            tokens: its prompt, if it does not carry it; an array is the quickest.

        Raises:
            SageIRError: it has no tokens, or more than the target's pool, or its id is running.
        """
        tokens = request.tokens if tokens is None else tokens
        if tokens is None:
            raise _refused(request, "its token ids are missing")
        if request.id in self._jobs:
            raise _refused(request, "a request of this id is running")
        tier = self.target.tier(DEVICE)
        room = (tier.blocks if tier else 0) * self.target.block_size
        need = request.prompt_len + request.max_new_tokens
        if need > room:
            raise _refused(request, f"it needs KV of {need} tokens, and the pool holds {room}")
        self._contents.add(request, tokens)
        self._dirty = True

    def next_step(self, view: EngineView) -> PlanStep | None:
        """The next step, or None while there is nothing to do: submit, and ask again.

        Raises:
            SageIRError: what is under way cannot be planned within the target.
        """
        if self._stale(view):
            self._new_epoch(view)
        if self.plan is None or self._position == len(self.plan.steps):
            if not self._frees:
                return None
            step = PlanStep(0, self.target.workers[0].name, loops=0)
        else:
            assert self._replay is not None
            step = self.plan.steps[self._position]
            self._replay.step(self._position, step)
            assert not self._replay.errors, self._replay.errors
            self._position += 1
        step = evolve(step, index=self._issued, kv=(*self._frees, *step.kv))
        self._frees = ()
        self._issued += 1
        return step

    def peek(self) -> PlanStep | None:
        """The next step if nothing happens until then; None: the plan is at its end, or outdated."""
        if self._dirty or self.plan is None or self._position == len(self.plan.steps):
            return None
        return self.plan.steps[self._position]

    def _stale(self, view: EngineView) -> bool:
        """Whether the plan no longer fits: also forgets the requests that have ended."""
        known = {seen.id: seen for seen in _seen(view)}
        states = self._replay.states if self._replay else {}
        stale = self._dirty
        for name in list(self._jobs):
            seen, state = known.get(name), states.get(name)
            ended = seen.finish is not None if seen else state is not None
            if ended:
                del self._jobs[name]
            if state is not None and ended != state.finished:
                stale = True
        drained = self.plan is None or self._position == len(self.plan.steps)
        return stale or (drained and any(name in known for name in self._jobs))

    def _new_epoch(self, view: EngineView) -> None:
        """Compile what is not finished, from the state that the last epoch left.

        Requests that do not fit together (answers and cached blocks cannot be dropped, and the
        lower tiers may be full of them) are planned by halves. Those left out wait for a later
        epoch; of their KV they keep what the cache keeps, and the rest is computed again.
        """
        carry = self._contents.carry(self._replay) if self._replay else Carry()
        seen = {request.id: request for request in _seen(view)}
        decls = self._decls(seen, carry)
        self._dirty = any(name not in seen for name in self._jobs)
        self.epochs += 1
        while True:
            try:
                self.plan = self._compile(decls, carry)
                break
            except SageIRError as error:
                if len(decls) < 2:
                    raise
                logger.debug("epoch %d: %d requests: %s", self.epochs, len(decls), error)
            decls = decls[: len(decls) // 2]
            carry = carry.only({decl.id for decl in decls})
        self._frees = carry.frees
        self._replay = Replay(self.plan)
        self._replay.header()
        assert not self._replay.errors, self._replay.errors
        self._position = 0

    def _compile(self, decls: tuple[RequestDecl, ...], carry: Carry) -> ExecutionPlan:
        """The plan of an epoch.

        Raises:
            SageIRError: the requests do not fit together: no tier has room for what must wait.
        """
        graph = IRGraph(
            f"epoch{self.epochs}",
            self.target,
            decls,
            _nodes(decls, self.target),
            tuple(CachedBlocks(held.tier, blocks=held.ids) for held in carry.resident),
        )
        return lower(self._passes.run(graph), resident=carry.resident, live=carry.live, retain=True)

    def _decls(self, seen: dict[str, RequestView], carry: Carry) -> tuple[RequestDecl, ...]:
        """What is under way, all of it and first; then the first requests that wait."""
        jobs = [job for name, job in self._jobs.items() if name in seen]
        running = [job for job in jobs if carry.computed.get(job.request.id)]
        waiting = [job for job in jobs if not carry.computed.get(job.request.id)]
        waiting.sort(key=lambda job: (-job.request.priority, job.number))
        above = max((job.request.priority for job in waiting), default=0) + 1
        below = min((job.request.priority for job in running), default=0)
        decls = []
        for job in (*running, *waiting[: self._window]):
            request, generated = job.request, seen[job.request.id].generated
            length = request.prompt_len + generated
            left = request.max_new_tokens - generated
            ahead = above - below if carry.computed.get(request.id) else 0
            decls.append(
                RequestDecl(
                    request.id,
                    max_new_tokens=min(left, self._reserve or left),
                    priority=request.priority + ahead,
                    deadline=request.deadline,
                    adapter=request.adapter,
                    tenant=request.tenant,
                    session=request.session,
                    prompt_len=length,
                    blocks=self._contents.blocks(job, length // self.target.block_size),
                )
            )
        return tuple(decls)


def _seen(view: EngineView) -> Iterator[RequestView]:
    yield from view.waiting
    yield from view.running
    yield from view.finished


def _nodes(decls: Iterable[RequestDecl], target: Target) -> tuple[IRNode, ...]:
    """A prefill and a decode for each request; turns of a session in the order they came."""
    nodes: list[IRNode] = []
    turns: dict[tuple[str | None, str], str] = {}
    for number, decl in enumerate(decls):
        after: tuple[str, ...] = ()
        prefill, decode = f"q{number}.p", f"q{number}.d"
        if decl.session is not None:
            turn = (decl.tenant, decl.session)
            after = (turns[turn],) if turn in turns else ()
            turns[turn] = decode
        made = (
            Prefill(prefill, decl.id, 0, decl.prompt_len, after=after),
            Decode(decode, decl.id, decl.prompt_len, decl.stop, operands=(prefill,)),
        )
        nodes += made
        if target.tp > 1:
            nodes += [collective(node, target, f"{node.name}.sum") for node in made]
    return tuple(nodes)


def _refused(request: PlanRequest, why: str) -> SageIRError:
    return SageIRError(Diagnostic(f"request {request.id!r} cannot be planned: {why}"))
