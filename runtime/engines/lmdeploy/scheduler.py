"""Plan steps as LMDeploy's scheduling decisions: the object behind `Scheduler.plan_source`.

A step that cannot be right (unknown requests, spans that were not computed, too many tokens) is
logged and dropped, and LMDeploy's own rules schedule instead; so no plan can lose a request.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from attrs import asdict, define
from lmdeploy.pytorch.messages import MessageStatus
from lmdeploy.pytorch.paging.scheduler import SchedulerOutput

from sagellm_ir.collecting import collect_early
from sagellm_ir.lowering.plan import PlanStep
from sagellm_ir.runtime.backend import EngineStats, EngineView, PlanSource
from sagellm_ir.runtime.engines.lmdeploy.admission import Admission, PartialPrefills
from sagellm_ir.runtime.engines.lmdeploy.checks import StepChecks, named, only
from sagellm_ir.runtime.engines.lmdeploy.flight import Flight
from sagellm_ir.runtime.engines.lmdeploy.grouping import RowOrder
from sagellm_ir.runtime.engines.lmdeploy.intake import Intake
from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager
from sagellm_ir.runtime.engines.lmdeploy.plan_blocks import PlanBlocks
from sagellm_ir.runtime.engines.lmdeploy.recorder import record
from sagellm_ir.runtime.engines.lmdeploy.rows import BatchRows
from sagellm_ir.runtime.engines.lmdeploy.stock import (
    answer_aborted,
    check_engine,
    output_of,
    schedule_stock,
)
from sagellm_ir.runtime.engines.lmdeploy.view import NamedSequences, Names
from sagellm_ir.runtime.trace import Trace

__all__ = ["PlanDriver"]

logger = logging.getLogger(__name__)

_MOVES_ONLY = 8
"""Steps without rows that a source may give in a row before LMDeploy schedules one itself."""
_IDLE = 0.1
"""Seconds until a source that had nothing is asked again: as LMDeploy does."""


@define
class _Counted:
    """See `EngineStats`."""

    steps: int = 0
    forwards: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0


class PlanDriver:
    """Drives one LMDeploy engine by a `PlanSource`. `attach` starts it, `detach` ends it.

    Args:
        engine: LMDeploy's `Engine`, patched; without data parallelism, speculative decoding or
            state-space layers (`ValueError` otherwise).
        source: where steps come from.
        requests: the scheduler's, under their names; None: all are named `session-N`.
        overlap: ask for the next step while one is in flight. A finished plan can do so; a source
            that reads the view cannot, as sequences in flight are not in it.
        hold: run nothing while the source gives nothing, instead of what LMDeploy would run.
    """

    def __init__(
        self,
        engine: Any,
        source: PlanSource,
        requests: NamedSequences | None = None,
        overlap: bool = False,
        hold: bool = False,
    ) -> None:
        check_engine(engine)
        self.engine = engine
        self.scheduler = engine.scheduler
        self.source = source
        self.overlap = overlap
        self.hold = hold
        self._counted = _Counted()
        self.kv = KVManager(self.scheduler)
        self.admission = Admission(self.kv)
        self.changed = asyncio.Event()
        """To be set when a source that had nothing has something."""
        self.trace: Trace | None = None
        """Where to note what is run; see `recording`."""
        self.rejected: list[str] = []
        """Why steps were dropped."""
        self.unplanned = 0
        """Steps that LMDeploy scheduled by its own rules."""
        self._todo: deque[PlanStep] = deque()
        self._ready: PlanStep | None = None
        self._gathering = 0
        """Forwards of the decodes in flight until LMDeploy has taken in what is to run after them."""
        self._plain: list[Any] | None = None
        """The rows of a step in `_ready` that only decodes them."""
        self.requests = requests or NamedSequences(self.scheduler, Names())
        self._news = self.requests.follow()
        self._checks = StepChecks(self.requests)
        self._flight = Flight(engine, self.admission, self._checks)
        self.intake = Intake(engine, self.admission.prefixes, self._flight, source)
        self._blocks = PlanBlocks(self.kv)
        self._order = RowOrder()
        engine.seq_strategy = PartialPrefills(
            engine.seq_strategy, self.admission, self._forward_done
        )
        self.scheduler.plan_source = self
        engine.req_manager.one_by_one = True

    def detach(self) -> None:
        """Let LMDeploy schedule by itself again. Not while a prefill chunk is in flight."""
        self.scheduler.plan_source = None
        self.engine.req_manager.one_by_one = False
        self.engine.seq_strategy = self.engine.seq_strategy._inner
        self.kv.detach()

    @property
    def stats(self) -> EngineStats:
        """What was scheduled, by plan and by LMDeploy, since the driver was made."""
        moved = self.kv.counters.spilled + self.kv.counters.restored
        return EngineStats(**asdict(self._counted), moved_blocks=moved)

    def view(self) -> EngineView:
        """What the engine reports to the source."""
        self.requests.refresh()
        return self.requests.snapshot()

    def move(self, step: PlanStep) -> None:
        """Do the moves and frees of a step without rows, while nothing is in flight."""
        self._blocks.move(step)

    def forget(self, request: str) -> None:
        """A request's id may be used again."""
        self._checks.seen.discard(request)

    # What the patched scheduler asks.

    def decide_prefill(self) -> bool | None:
        """Whether the next step is a prefill; None leaves it to LMDeploy."""
        self._ready = self._plain = None
        self._refresh()
        if self._is_in_flight():
            return self._look_ahead()
        for _ in range(_MOVES_ONLY):
            if not self._todo:
                self._todo.extend(self._ask())
            if not self._todo:
                return None
            if self._is_plain(self._todo[0]):
                self._ready = self._todo[0]
                return False
            if self._checks.must_wait(self._todo[0]):
                return False
            self._todo.extendleft(reversed(self._checks.parts(self._todo.popleft())))
            if named(self._todo[0]):
                self._ready = self._todo[0]
                return bool(self._ready.prefill)
            self._blocks.move(self._todo.popleft())
        return None

    def _is_plain(self, step: PlanStep) -> bool:
        """Whether a step only decodes rows that all run, as nearly always; looked at quickly."""
        self._plain = None
        if step.prefill or not step.decode or self.scheduler.num_locked():
            return False
        rows = list(map(self.requests.found.get, step.decode))
        running = MessageStatus.RUNNING
        if [1 for seq in rows if seq is None or seq._status is not running]:
            return False
        if len(set(step.decode)) == len(rows) <= self.scheduler.scheduler_config.max_batches:
            self._plain = rows
        return self._plain is not None

    def _look_ahead(self) -> bool:
        """Have the next step ready while one is in flight, if the source knows it already."""
        ahead = getattr(self.source, "ahead", None)
        if not self._todo and ahead is not None:
            self._todo.extend(self._steps(ahead))
        if not self._todo:
            return False
        step = self._todo[0]
        rows = [] if step.prefill else [self.requests.found.get(name) for name in step.decode]
        if self._flight.leads_to(step, rows):
            self._ready, self._plain = step, rows or None
        return self._ready is not None and bool(step.prefill)

    def schedule(self, is_prefill: bool, prealloc_size: int) -> SchedulerOutput:
        """The next step. Empty while it must wait for the one in flight."""
        if self._is_in_flight() and self._ready is None:
            return output_of([])
        output = self._planned(is_prefill, prealloc_size) if self._todo else None
        if output is None:
            output = output_of([]) if self.hold else self._stock(is_prefill, prealloc_size)
            output.prefix_groups = BatchRows.of(output.running, is_prefill)
            self.unplanned += bool(output.running)
        answer_aborted(self.engine)
        self._count(output, is_prefill)
        if self.trace is not None and output.running:
            pending = int(output.follows is not None)
            record(self.trace, self.requests.names, self.kv.blocks, output, is_prefill, pending)
        if output.running:
            self._flight.took(output.running, is_prefill)
            self.intake.began()
        return output

    async def idle(self) -> None:
        """Wait after a step that ran nothing, while nothing is in flight."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.changed.wait(), _IDLE)
        self.changed.clear()

    def _count(self, output: SchedulerOutput, is_prefill: bool) -> None:
        if not output.running:
            return
        if output.loop_count is None:
            output.loop_count = self.engine.engine_strategy.get_num_loops(not is_prefill)
        # A prefill is one forward: what comes meanwhile is not waited for.
        self._gathering = 2 if is_prefill else output.loop_count // 2 + 1
        rows = len(output.running)
        tokens = sum(seq.num_token_ids for seq in output.running) if is_prefill else rows
        tokens *= output.loop_count
        counted = self._counted
        counted.steps += 1
        counted.forwards += output.loop_count
        if is_prefill:
            counted.prefill_tokens += tokens
        else:
            counted.decode_tokens += tokens

    def _refresh(self) -> None:
        self.requests.refresh()
        come, gone = self._news.take()
        self._checks.seen.update([seen.id for seen in come])
        for seen in gone:
            self.admission.prefixes.forget(seen.seq)
        if gone:
            self._order.release()

    def _forward_done(self) -> None:
        """Tokens of a forward have come: let the source see who has ended, while the next one runs.

        In the first half of a decode decision LMDeploy takes in what is to run after it. Then is the
        time to compile, not in the next decision.
        """
        self._gathering -= 1
        what = "observe" if self._gathering > 0 else "prepare"
        if (call := getattr(self.source, what, None)) is not None:
            asyncio.get_running_loop().call_soon(self.between, call)

    def between(self, call: Callable[[], None]) -> None:
        """Let the source do something between two decisions, and what would else be done in one."""
        if self.scheduler.plan_source is self:
            self._refresh()
            self._steps(call)
            waiting = self.scheduler.seq_manager.get_sequences(MessageStatus.WAITING)
            self.admission.prefixes.read(waiting.values())
            self._blocks.settle()
            self.kv.keep_room()
            collect_early()

    def _is_in_flight(self) -> bool:
        return not self.overlap and self.scheduler.num_locked() > 0

    # Steps.

    def _ask(self) -> list[PlanStep]:
        return self._steps(lambda: self.source.next_step(self.requests.view()))

    def _steps(self, ask: Callable[[], PlanStep | None]) -> list[PlanStep]:
        try:
            step = ask()
        except Exception:
            logger.exception("the plan source failed; LMDeploy schedules this step")
            self.rejected.append("the source failed")
            return []
        return [] if step is None else [step]

    def _planned(self, is_prefill: bool, prealloc_size: int) -> SchedulerOutput | None:
        step = self._todo[0]
        plain = self._plain if step is self._ready and not is_prefill else None
        if plain is not None and 1 <= step.loops <= max(1, prealloc_size):
            self._todo.popleft()
            return self._run(step, plain, is_prefill)
        if step is not self._ready and self._checks.must_wait(step):
            return output_of([])
        if is_prefill != bool(step.prefill):
            # A planned prefill admitted nobody, and the engine asks for a decode instead.
            self._todo.popleft()
            return None
        self._todo.popleft()
        if problem := self._checks.problem(step, prealloc_size, self.admission.partial):
            logger.warning("step %d of the plan dropped: %s", step.index, problem)
            self.rejected.append(problem)
            return None
        rows = [self.requests.found[name] for name in named(step)]
        return self._run(step, rows, is_prefill)

    def _run(self, step: PlanStep, seqs: list[Any], is_prefill: bool) -> SchedulerOutput | None:
        """A step that was found right; the sequences in its order."""
        self._blocks.move(step)
        admission, names, pending = self.admission, named(step), 0
        if is_prefill:
            ran = admission.prefill(zip(seqs, step.prefill, strict=True))
        else:
            pending = self._flight.pending(seqs)
            ran = admission.decode(seqs, step.loops + pending)
        if refused := admission.refused:
            if not ran:
                self.rejected.append("there is no room for its rows")
                return None
            left = {name for name, seq in zip(names, seqs, strict=True) if seq.seq_id in refused}
            self._todo.appendleft(only(step, left))
        if not ran:
            return None
        for bind in step.binds:
            if (seq := self.requests.found.get(bind.request)) is not None:
                self._blocks.bind(bind, seq)
        if len(ran) < len(seqs):
            running = {seq.seq_id for seq in ran}
            pairs = zip(names, seqs, strict=True)
            names = [name for name, seq in pairs if seq.seq_id in running]
        if admission.evicted:
            admission.evicted = False
            self._order.forget()
        ordered, groups = self._order.of(step, names, ran)
        output = output_of(ordered, *self.kv.blocks.take_swaps())
        output.loop_count = 1 if is_prefill else step.loops
        output.follows = self._flight.places(ordered) if pending else None
        output.prefix_groups = BatchRows.of(ordered, is_prefill, groups, pending)
        return output

    def _stock(self, is_prefill: bool, prealloc_size: int) -> SchedulerOutput:
        self.admission.evicted = True
        return schedule_stock(self.kv, is_prefill, prealloc_size)
