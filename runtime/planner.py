"""Plan sources: `PlanCursor` walks a finished plan, `OnlinePlanner` compiles while an engine runs.

The online planner works in epochs. An epoch compiles, by the same passes as ahead of time, what has
come and not yet finished its prompt, against what the engine's tiers hold and the seats that are
left: a fragment. Its steps are given out up to the end of its first prefills, with its block numbers
replaced by the engine's; then what it started joins the batch of requests that decode, and what it
could not start waits for an epoch after some of them have ended. So an epoch costs what has come, not
what is there.

A request that is compiled again (its prefill was interrupted, or its answer outgrew what was
planned) enters as one whose prompt is all it has so far. Its full blocks are cached content that
`kv-reuse` hits; private ids stand for blocks of generated tokens. The block it is in the middle of is
a `LiveBlock`. So nothing is computed twice.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, takewhile

from attrs import evolve

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import RequestDecl
from sagellm_ir.lowering.plan import (
    Bind,
    Collective,
    ExecutionPlan,
    KVMove,
    PlanRequest,
    PlanStep,
    PrefillChunk,
)
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.runtime.backend import EngineView
from sagellm_ir.runtime.batch import Batch
from sagellm_ir.runtime.fragment import Fragment, Held, assemble
from sagellm_ir.runtime.ledger import Ledger
from sagellm_ir.runtime.requests import Job, Requests, Row
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
        self.epochs = 0
        """Compilations so far."""
        self._newest: Callable[[], ExecutionPlan] | None = None
        """Makes the plan of the newest fragment."""
        self._passes = PassManager(Pipeline.parse(pipeline))
        self._reserve, self._window = reserve, window
        self._requests = Requests(target)
        self._ledger = Ledger(target, spill)
        self._batch = Batch(target, outlast)
        self._rows: dict[str, Row] = {}
        """Requests that hold blocks."""
        self._hidden: set[str] = set()
        """Requests that the engine has not reported yet."""
        self._fragment: Fragment | None = None
        self._spent: dict[str, None] = {}
        """Requests that the last steps gave all their planned tokens."""
        self._fresh = False
        """Whether something has come since the last compilation."""
        self._full = False
        """Whether those that wait cannot start until something ends or comes."""
        self._sums: tuple[Collective, ...] = ()
        """The collectives of some step."""
        self._issued = 0
        self._rested = 0.0
        """Predicted seconds since the decodes ran last."""

    @property
    def plan(self) -> ExecutionPlan | None:
        """The newest fragment, whole, in block numbers of its own, its steps numbered from 0.

        Any thread may ask: it is lowered again, as the planner itself lowers only what it runs.
        """
        return self._newest() if self._newest is not None else None

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
        if request.id in self._requests.jobs:
            raise _refused(request, "a request of this id is running")
        tier = self.target.tier(DEVICE)
        room = (tier.blocks if tier else 0) * self.target.block_size
        need = request.prompt_len + request.max_new_tokens
        if need > room:
            raise _refused(request, f"it needs KV of {need} tokens, and the pool holds {room}")
        self._requests.add(request, tokens)
        self._hidden.add(request.id)
        self._fresh, self._full = True, False
        if self._fragment is not None and self._is_urgent(request):
            self._close()

    def end(self, name: str, tokens: Sequence[int] | None = None) -> None:
        """A request has ended, in whatever way; no step is in flight that names it.

        Args:
            name: of the request; nothing happens when it is not known.
            tokens: its prompt and its answer, so that the blocks of the answer can be used again.
        """
        if name not in self._requests.jobs:
            return
        job = self._requests.end(name)
        self._hidden.discard(name)
        self._full = False
        row = self._rows.pop(name, None)
        self._spent.pop(name, None)
        planned = self._fragment is not None and name in self._fragment.decls
        if planned and (row is None or row.computed < job.known):
            self._close()
        for shelf in self._ledger.values():
            shelf.forget(job.private)
        if row is not None:
            self._release(name, row, tokens)

    def next_step(self, view: EngineView) -> PlanStep | None:
        """The next step, or None while there is nothing to do: submit, and ask again.

        Raises:
            SageIRError: what is under way cannot be planned within the target.
        """
        seen = {request.id: request for request in (*view.waiting, *view.running)}
        for request in view.finished:
            self.end(request.id)
        for name in self._requests.jobs.keys() - seen.keys() - self._hidden:
            self.end(name)
        self._hidden -= seen.keys()
        return self.advance(lambda name: seen[name].generated)

    def advance(self, answered: Callable[[str], int]) -> PlanStep | None:
        """`next_step` for who says `end` of what has ended, and `meet` of what has come.

        Args:
            answered: the tokens that a request's answer has so far.
        """
        if self._spent:
            self._settle(answered)
        if self._is_early():
            self._close()
        step = self._planned()
        if step is None and self._may_start():
            self._new_epoch()
            step = self._planned()
        if step is None and len(self._batch):
            step = self._decode()
        elif step is None and self._rows:
            # Each holds what another one needs.
            for row in list(self._rows.values()):
                self._requeue(row.job)
            self._new_epoch()
            step = self._planned()
        changes = self._ledger.take_changes()
        if step is None and not changes:
            return None
        step = step or PlanStep(0, self.target.workers[0].name, loops=0)
        step = evolve(step, index=self._issued, kv=(*changes, *step.kv))
        self._issued += 1
        return step

    def meet(self, name: str) -> None:
        """The engine has a request that was submitted."""
        self._hidden.discard(name)

    def lost(self, name: str, answered: int) -> None:
        """The engine has dropped what it computed of a request that decodes: it is planned again."""
        row = self._rows.get(name)
        if row is not None and name in self._batch:
            self._batch.leave(name)
            row.job.answered = answered
            self._requeue(row.job)

    def compile_ahead(self) -> None:
        """Compile what has come, while a step is in flight: the next `advance` need not."""
        if self._fragment is None and self._may_start():
            self._new_epoch()

    def step_ahead(self) -> PlanStep | None:
        """The next step while prefills are in flight, when it is one of prefills without moves."""
        if self._spent:
            return None  # What they hold is not known yet.
        self.compile_ahead()
        step = None if self._fragment is None else self._fragment.next()
        if step is None or not step.prefill or any(isinstance(it, KVMove) for it in step.kv):
            return None
        return self.advance(lambda name: 0)

    # Epochs.

    def _is_urgent(self, request: PlanRequest) -> bool:
        """Whether a request should not wait until those before it have started."""
        assert self._fragment is not None
        before = [
            self._requests.jobs[name].request
            for name in self._fragment.decls
            if name in self._requests.waiting
        ]
        return request.deadline is not None or any(
            request.priority > other.priority for other in before
        )

    def _may_start(self) -> bool:
        """Whether to compile now, rather than let the batch decode on.

        A prefill now, and another one for what comes during the next decode step, keep the rows of
        the batch waiting for one decision more, which costs about two forwards; a prefill after that
        step keeps those that wait now waiting for the step. The larger sum of seconds decides.
        """
        under_way = len(self._rows) - len(self._batch) - len(self._spent)
        waiting = len(self._requests.waiting) - len(self._hidden)
        if waiting <= 0 and not under_way:
            return False
        if under_way or not self._rested:
            return under_way > 0 or (self._seats() > 0 and not self._full)
        urgent = waiting * self.target.max_loops >= 2 * len(self._batch)
        return urgent and self._seats() > 0 and not self._full

    def _is_early(self) -> bool:
        """Whether the fragment was compiled before something came that could run in its first step.

        A prefill more, for what came too late, costs the batch more than compiling again.
        """
        fragment = self._fragment
        if fragment is None or fragment.position or not self._fresh or self._hidden:
            return False
        return len(fragment.decls) < min(self._seats(), self._window)

    def _seats(self) -> int:
        return min(self.target.max_batch, self.target.max_tokens) - len(self._batch)

    def _new_epoch(self) -> None:
        """Compile what has come and what has not finished its prompt.

        Requests that do not fit together (the lower tiers may be full of what cannot be dropped)
        are planned by halves. Those left out lose what they hold but for what the cache keeps, and
        the rest is computed again.
        """
        self._requests.tidy(self._ledger)
        self._fresh = False
        jobs = [
            row.job
            for name, row in self._rows.items()
            if name not in self._batch and name not in self._spent
        ]
        first = len(jobs)
        jobs += islice(self._candidates(), max(min(self._window, self._seats()) - first, 0))
        self.epochs += 1
        while jobs:
            try:
                self._fragment = self._compile(jobs)
                self._newest = self._fragment.plan
                return
            except SageIRError as error:
                if len(jobs) < 2 and not len(self._batch):
                    raise
                logger.debug("epoch %d: %d requests: %s", self.epochs, len(jobs), error)
            for job in jobs[len(jobs) // 2 :]:
                self._requeue(job)
            jobs = jobs[: len(jobs) // 2]
        self._full = True

    def _candidates(self) -> Iterator[Job]:
        """Those that may start, up to the first that there is no room for."""
        device, size = self._ledger[DEVICE], self.target.block_size
        for job in self._requests.eligible():
            if job.request.id in self._hidden:
                continue
            left = job.request.max_new_tokens - job.answered
            need = -(-(job.known + min(left, self._reserve or left)) // size)
            if need > device.room:
                need -= sum(1 for _ in takewhile(device.block_of.__contains__, job.blocks))
                if need > device.room:
                    return
            yield job

    def _compile(self, jobs: Sequence[Job]) -> Fragment:
        above = max((job.request.priority for job in jobs), default=0) + 1
        below = min((job.request.priority for job in jobs), default=0)
        decls, held = [], []
        for job in jobs:
            name = job.request.id
            row = self._rows.get(name)
            ahead = above - below if row else 0  # What is under way goes first.
            decls.append(self._requests.decl(job, self._reserve, job.request.priority + ahead))
            if row is not None and (block := self._hold(row, decls[-1])):
                held.append(block)
        target = evolve(
            self.target,
            max_batch=self.target.max_batch - len(self._batch),
            max_tokens=self.target.max_tokens - (len(self._batch) if self.target.mixed else 0),
        )
        name = f"epoch{self.epochs}"
        return assemble(name, target, decls, held, self._ledger, self._passes.run)

    def _hold(self, row: Row, decl: RequestDecl) -> Held | None:
        """Let a row under way find its full blocks as cached content; the block it is inside of."""
        device, size = self._ledger[DEVICE], self.target.block_size
        full, inside = divmod(row.computed, size)
        for content, block in zip(decl.blocks[:full], row.table, strict=False):
            device.write(block, content)
        return Held(decl.id, row.table[full], row.computed) if inside else None

    def _requeue(self, job: Job) -> None:
        """Plan a request anew, from what the cache keeps of it."""
        row = self._rows.pop(job.request.id, None)
        if row is not None:
            self._ledger[DEVICE].drop(row.table)
            self._requests.waiting[job.request.id] = job

    def _close(self) -> None:
        """Give up what is left of the fragment."""
        if self._fragment is not None:
            self._fragment.close()
            self._fragment = None

    # Steps.

    def _planned(self) -> PlanStep | None:
        """The fragment's next step; None at the end of its first prefills."""
        fragment = self._fragment
        step = None if fragment is None else fragment.next()
        if fragment is None or step is None:
            self._close()
            return None
        # What has begun to decode has its blocks already.
        fresh = [bind for bind in step.binds if bind.request not in fragment.begun]
        fragment.forget(step.kv)
        if not fragment.fits(step.kv, fresh):
            self._full = True
            self._close()
            return None
        fragment.position += 1
        moves = fragment.moves(step.kv)
        binds = [self._bind(fragment, bind) for bind in fresh]
        ended = [self._rows[chunk.request] for chunk in step.prefill if self._compute(chunk)]
        step = self._join(evolve(step, kv=tuple(moves)), len(ended))
        fragment.begun.update(row.job.request.id for row in ended)
        binds += [bind for row in ended if (bind := self._begin(row)) is not None]
        if fragment.next() is None:
            # What of it has not started waits for something to end.
            self._full = any(name in self._requests.waiting for name in fragment.decls)
            self._close()
        return evolve(step, binds=tuple(binds))

    def _bind(self, fragment: Fragment, bind: Bind) -> Bind:
        """Let a table hold blocks; the request has a row from here on."""
        row = self._rows.get(bind.request)
        if row is None:
            job = self._requests.waiting.pop(bind.request)
            row = self._rows[bind.request] = Row(job)
        row.left = fragment.decls[bind.request].max_new_tokens
        device, blocks = self._ledger[DEVICE], fragment.blocks(DEVICE, bind.blocks)
        stop = bind.at + len(blocks)
        device.hold(blocks)
        device.drop(row.table[bind.at : stop])
        row.table[bind.at : stop] = blocks
        return Bind(bind.request, bind.at, blocks)

    def _compute(self, chunk: PrefillChunk) -> bool:
        """Note what a chunk writes; whether it ends its prompt."""
        row, device, size = self._rows[chunk.request], self._ledger[DEVICE], self.target.block_size
        for at in range(chunk.start // size, chunk.stop // size):
            device.write(row.table[at], row.job.blocks[at])
        row.computed = max(row.computed, chunk.stop)
        return chunk.stop == row.job.known

    def _begin(self, row: Row) -> Bind | None:
        """A prompt has ended, and gives the first token: take the blocks of the answer, and decode.

        Where blocks are short, it decodes as far as it gets, and is planned again.
        """
        job, device, size = row.job, self._ledger[DEVICE], self.target.block_size
        name, old = job.request.id, len(row.table)
        need = -(-(job.known + row.left) // size) - old
        blocks = device.take(min(need, device.room)) if need > 0 else ()
        row.table += blocks
        left = min(row.left, len(row.table) * size - job.known) - 1
        if left > 0:
            shareable = tuple(row.table[: job.known // size])
            self._batch.enter(name, job.known + 1, left, shareable)
        else:
            self._spent[name] = None
        return Bind(name, old, blocks) if blocks else None

    def _join(self, step: PlanStep, ends: int) -> PlanStep:
        """The batch runs in a step with prefills, where the target mixes them; else it rests."""
        self._sums = step.collectives or self._sums
        batch = self._batch
        if not self.target.mixed or not len(batch):
            self._rested += step.cost if len(batch) else 0.0
            return evolve(
                step, decode=()
            )  # What the fragment would decode may have left the batch.
        size = self.target.block_size
        tables = [
            (chunk.request, tuple(self._rows[chunk.request].table[: chunk.start // size]))
            for chunk in step.prefill
        ]
        tokens = sum(chunk.stop - chunk.start for chunk in step.prefill) + len(batch)
        step = evolve(
            step,
            decode=batch.names,
            loops=1,
            groups=batch.groups(tables),
            collectives=batch.sums(self._sums, tokens),
            cost=batch.seconds(1, step.prefill, ends),
        )
        self._spent.update(dict.fromkeys(batch.run(1)))
        return step

    def _decode(self) -> PlanStep:
        """The batch runs alone."""
        batch, loops = self._batch, self._batch.loops()
        step = PlanStep(
            0,
            self.target.workers[0].name,
            decode=batch.names,
            loops=loops,
            groups=batch.groups(),
            collectives=batch.sums(self._sums, len(batch)),
            cost=batch.seconds(loops),
        )
        self._spent.update(dict.fromkeys(batch.run(loops)))
        self._rested = 0.0
        return step

    def _settle(self, answered: Callable[[str], int]) -> None:
        """Requests that have their planned tokens: what is not over is planned again."""
        for name in self._spent:
            row = self._rows[name]
            job = row.job
            job.answered = answered(name)
            if job.answered < job.request.max_new_tokens:
                size = self.target.block_size
                row.computed = min(job.known - 1, len(row.table) * size)
                used = -(-row.computed // size)
                self._ledger[DEVICE].drop(row.table[used:])
                del row.table[used:]
            else:  # The engine will say that it has ended.
                del self._rows[name]
                self._ledger[DEVICE].drop(row.table)
        self._spent.clear()

    def _release(self, name: str, row: Row, tokens: Sequence[int] | None) -> None:
        """A request holds its blocks no more; full ones of its answer stay cached if it is known."""
        device = self._ledger[DEVICE]
        if name in self._batch:
            self._batch.leave(name)
        if tokens is not None:
            size = self.target.block_size
            answer = slice(row.job.request.prompt_len // size, (len(tokens) - 1) // size)
            contents = self._requests.contents(row.job, tokens)[answer]
            for content, block in zip(contents, row.table[answer], strict=False):
                device.write(block, content)
        device.drop(row.table)


def _refused(request: PlanRequest, why: str) -> SageIRError:
    return SageIRError(Diagnostic(f"request {request.id!r} cannot be planned: {why}"))
