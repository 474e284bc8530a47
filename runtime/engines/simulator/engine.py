"""`SimulatorEngine`: runs plans in virtual time, by the cost model. No model, no weights, no KV.

It answers with made-up tokens, the same in every run. Workers run side by side: a step starts when
its worker is free, its requests have arrived, and the workers it copies KV from have made it.
"""

from collections.abc import Iterator, Mapping
from zlib import crc32

from sagellm_ir.cost import CostModel
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import ExecutionPlan, KVMove, PlanRequest, PlanStep
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.backend import (
    EngineStats,
    EngineView,
    PlanSource,
    Synchronous,
    TokenEvent,
)
from sagellm_ir.runtime.engines.simulator.report import RequestReport, SimulationReport
from sagellm_ir.runtime.engines.simulator.sequence import Sequence
from sagellm_ir.runtime.protocols import CapabilityDescriptor
from sagellm_ir.runtime.trace import Trace, TraceRow
from sagellm_ir.target import DEVICE, Target

__all__ = ["SimulatorEngine"]


class SimulatorEngine(Synchronous):
    """An `InferenceBackend` in virtual time.

    Args:
        target: whose costs to take; a plan for another one (what if?) may run on it too.
        lengths: where answers end by themselves, by request id; others run to `max_new_tokens`.
    """

    def __init__(self, target: Target, lengths: Mapping[str, int] | None = None) -> None:
        self.target = target
        self._cost = CostModel(target)
        self._lengths = lengths or {}
        self._sequences: dict[str, Sequence] = {}
        self._pending: list[TokenEvent] = []
        self._clock = {worker.name: 0.0 for worker in target.workers}
        self._busy = 0.0
        self._steps = self._forwards = self._prefill_tokens = self._decode_tokens = 0
        self._generated = self._spilled = self._reloaded = self._handed = 0
        self._move_seconds = 0.0
        self.trace: Trace | None = None
        """Records what is run, where one is set."""
        self._tables: dict[tuple[str, str], list[int]] = {}
        """The blocks of a worker's requests, while a trace is recorded."""

    @property
    def capability(self) -> CapabilityDescriptor:
        """Everything."""
        tiers = tuple(tier.name for tier in self.target.tiers)
        return CapabilityDescriptor("simulator", device="virtual", tiers=tiers, max_tp=1024)

    def submit(self, request: PlanRequest, sampling: Sampling = Sampling()) -> None:
        """Make a request known.

        Raises:
            SageIRError: its id is running already.
        """
        running = self._sequences.get(request.id)
        if running and not running.finish:
            raise SageIRError(Diagnostic(f"request {request.id!r} is running already"))
        length = min(request.max_new_tokens, self._lengths.get(request.id, request.max_new_tokens))
        self._sequences[request.id] = Sequence(request, length)

    def step(self, step: PlanStep) -> list[TokenEvent]:
        """Run one step.

        Raises:
            SageIRError: it names an unknown request, worker or tier.
        """
        events, self._pending = self._pending, []
        for sequence, first, count in self._run(step):
            for index in range(first, first + count):
                last = index == sequence.generated - 1
                name = f"{sequence.request.id}:{index}".encode()
                token = crc32(name) % self.target.model.vocab
                events.append(
                    TokenEvent(
                        sequence.request.id,
                        token,
                        text=f" {token}",
                        index=index,
                        finish=sequence.finish if last else None,
                    )
                )
        return sorted(events, key=lambda event: event.index)

    def stream(self, source: PlanSource) -> Iterator[TokenEvent]:
        """Run a source's steps until it has none left."""
        while (step := source.next_step(self.view())) is not None:
            yield from self.step(step)
        yield from self._pending
        self._pending = []

    def execute(self, plan: ExecutionPlan) -> SimulationReport:
        """Submit a plan's requests, run its steps, and report; makes no tokens.

        Raises:
            SageIRError: as `step`.
        """
        for request in plan.requests:
            if request.id not in self._sequences:
                self.submit(request)
        for step in plan.steps:
            self._run(step)
        return self.report()

    def view(self) -> EngineView:
        """See `InferenceBackend`. It keeps no KV, so it reports none."""
        views = [sequence.view() for sequence in self._sequences.values()]
        return EngineView(
            waiting=tuple(v for v in views if not v.finish and not v.computed),
            running=tuple(v for v in views if not v.finish and v.computed),
            finished=tuple(v for v in views if v.finish),
        )

    def abort(self, request: str) -> None:
        """End a request; its last event comes with the next step."""
        sequence = self._sequence(request)
        if not sequence.finish:
            sequence.finish = "abort"
            self._pending.append(
                TokenEvent(request, None, index=sequence.generated, finish="abort")
            )

    def release(self, request: str) -> None:
        """Forget a request."""
        self._sequences.pop(request, None)

    def stats(self) -> EngineStats:
        """Counters since the engine was made, seconds in virtual time."""
        return EngineStats(
            self._steps,
            self._forwards,
            self._prefill_tokens,
            self._decode_tokens,
            self._generated,
            self._spilled + self._reloaded + self._handed,
            self._busy - self._move_seconds,
            self._move_seconds,
        )

    def report(self) -> SimulationReport:
        """What has run so far."""
        moved = self._spilled + self._reloaded + self._handed
        return SimulationReport(
            max(self._clock.values()),
            self._busy,
            tuple(
                RequestReport(
                    sequence.request.id,
                    sequence.request.arrival,
                    sequence.first_token,
                    sequence.last_token if sequence.finish else None,
                    sequence.request.prompt_len,
                    sequence.own,
                    sequence.generated,
                )
                for sequence in self._sequences.values()
            ),
            self._steps,
            self._forwards,
            self._prefill_tokens,
            self._generated,
            self._spilled,
            self._reloaded,
            self._handed,
            moved * self.target.block_bytes,
        )

    def _run(self, step: PlanStep) -> list[tuple[Sequence, int, int]]:
        """Run a step: for each row that made tokens, the first one's index and their number."""
        if step.worker not in self._clock:
            raise SageIRError(Diagnostic(f"step {step.index} is of unknown worker {step.worker!r}"))
        begin = self._clock[step.worker]
        seconds = 0.0
        for action in step.kv:
            if isinstance(action, KVMove):
                seconds += self._move(step, action)
                begin = max(begin, self._clock[action.from_worker or step.worker])
        self._move_seconds += seconds
        chunks = [(self._sequence(chunk.request), chunk) for chunk in step.prefill]
        rows = [row for name in step.decode if not (row := self._sequence(name)).finish]
        for sequence, _ in chunks:
            begin = max(begin, sequence.request.arrival)
        loops = min(
            1 if chunks else step.loops, max((s.length - s.generated for s in rows), default=1)
        )
        if chunks or (rows and loops):
            seconds += loops * self._forward(step, rows, loops)
            self._forwards += loops
        if self.trace is not None:
            self._record(self.trace, step, rows, loops)
        end = self._clock[step.worker] = begin + seconds
        self._busy += seconds
        self._steps += 1
        made = []
        for sequence, chunk in chunks:
            self._prefill_tokens += chunk.stop - chunk.start
            if not sequence.generated:
                sequence.own += chunk.stop - chunk.start
            yields = chunk.stop == sequence.known and not sequence.finish
            sequence.computed = max(sequence.computed, chunk.stop)
            if yields:
                made.append(self._push(sequence, 1, end))
        each = (end - begin) / loops if loops else 0.0
        for sequence in rows:
            count = min(loops, sequence.length - sequence.generated)
            sequence.computed = sequence.known + count - 1
            self._decode_tokens += count
            made.append(self._push(sequence, count, end - (loops - count) * each))
        return made

    def _record(self, trace: Trace, step: PlanStep, rows: list[Sequence], loops: int) -> None:
        """Report a step's forwards, before its rows have advanced."""
        for action in step.kv:
            if isinstance(action, KVMove):
                trace.moved(step.worker, action)
        for bind in step.binds:
            table = self._tables.setdefault((step.worker, bind.request), [])
            table[bind.at : bind.at + len(bind.blocks)] = bind.blocks
        for forward in range(loops if step.prefill or rows else 0):
            spans = [(chunk.request, chunk.start, chunk.stop, False) for chunk in step.prefill]
            for row in rows:
                if row.generated + forward < row.length:
                    stop = row.known + forward
                    spans.append((row.request.id, stop - 1, stop, True))
            trace.ran(
                step.worker,
                [
                    TraceRow(
                        *span, trace.cut(self._tables.get((step.worker, span[0]), ()), span[2])
                    )
                    for span in spans
                ],
            )

    def _push(self, sequence: Sequence, count: int, now: float) -> tuple[Sequence, int, int]:
        first = sequence.generated
        sequence.generated += count
        self._generated += count
        if not first:
            sequence.first_token = now
        sequence.last_token = now
        if sequence.generated >= sequence.length:
            short = sequence.length < sequence.request.max_new_tokens
            sequence.finish = "stop" if short else "length"
        return sequence, first, count

    def _forward(self, step: PlanStep, rows: list[Sequence], loops: int) -> float:
        """Seconds of one of the step's forwards; of many, the middle one."""
        tokens = logits = len(rows)
        context = sum(sequence.known for sequence in rows) + tokens * (loops - 1) // 2
        pairs, read = context, context
        for chunk in step.prefill:
            size = chunk.stop - chunk.start
            tokens += size
            pairs += size * (chunk.start + chunk.stop + 1) // 2
            read += chunk.start
            logits += chunk.stop == self._sequence(chunk.request).known
        ended = any(self._sequences[name].finish for name in step.decode)
        for group in step.groups:
            members = len(group.requests)
            if ended:
                members = sum(1 for name in group.requests if not self._sequences[name].finish)
            read -= max(members - 1, 0) * (group.stop - group.start)
        seconds = self._cost.forward(tokens, pairs, read, logits)
        for reduce in step.collectives:
            seconds += self._cost.allreduce(reduce.bytes, reduce.calls)
        return seconds

    def _move(self, step: PlanStep, move: KVMove) -> float:
        """Count a move; its seconds."""
        if move.from_tier == move.to_tier == DEVICE:
            self._handed += len(move.src)
        elif move.to_tier == DEVICE:
            self._reloaded += len(move.src)
        else:
            self._spilled += len(move.src)
        far = move.to_tier if move.from_tier == DEVICE else move.from_tier
        if self.target.tier(far) is None:
            raise SageIRError(Diagnostic(f"step {step.index} moves KV by unknown tier {far!r}"))
        return self._cost.transfer(len(move.src), far)

    def _sequence(self, request: str) -> Sequence:
        if request not in self._sequences:
            message = f"the plan names request {request!r}, which was never submitted"
            raise SageIRError(Diagnostic(message))
        return self._sequences[request]
