"""`EmbeddedEngine`: does what a `PlanStep` says, in this process, on a CPU or one GPU."""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from attrs import evolve

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import ExecutionPlan, KVFree, KVMove, PlanRequest, PlanStep
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.accel import AccelConfig
from sagellm_ir.runtime.backend import (
    EngineStats,
    EngineView,
    PlanSource,
    Synchronous,
    TokenEvent,
)
from sagellm_ir.runtime.engines.embedded.batch import make_batch
from sagellm_ir.runtime.engines.embedded.checks import check_profile, check_request, check_target
from sagellm_ir.runtime.engines.embedded.kernels import kernel_attention
from sagellm_ir.runtime.engines.embedded.model import CausalLM
from sagellm_ir.runtime.engines.embedded.pool import KVPool
from sagellm_ir.runtime.engines.embedded.sampling import draw
from sagellm_ir.runtime.engines.embedded.sequence import Sequence
from sagellm_ir.runtime.engines.embedded.transfer import pack, unpack
from sagellm_ir.runtime.engines.embedded.work import Work, ordered
from sagellm_ir.runtime.engines.embedded.worker import WorkerMemory
from sagellm_ir.runtime.engines.tiers import check_move
from sagellm_ir.runtime.protocols import (
    DEVICE_KINDS,
    KV_DTYPES,
    CapabilityDescriptor,
    KVChunk,
    KVSchemaConfig,
)
from sagellm_ir.runtime.trace import Trace, TraceRow
from sagellm_ir.target import Target

__all__ = ["EmbeddedEngine"]


class EmbeddedEngine(Synchronous):
    """A model, and one KV pool for each worker of the target. It holds no scheduling policy.

    A step's decode rows of requests that have ended are skipped. Its prefill chunks always run:
    other requests may share the blocks they fill.

    Raises:
        SageIRError: the target asks for what the engine cannot do, or is for another model.
    """

    def __init__(
        self,
        model: CausalLM,
        target: Target,
        *,
        stop_at_eos: bool = True,
        kv_schema: KVSchemaConfig = KVSchemaConfig(),
        accel: AccelConfig = AccelConfig(),
    ) -> None:
        """
        Args:
            target: made with the model's spec, as `kv_schema.fit` gives it.
            stop_at_eos: False generates to the planned length, as benchmarks need.
            kv_schema: how KV is stored.
            accel: which kernels attend on a GPU; see `kernel_attention`.
        """
        self.model = model
        self.target = target
        self._spec = kv_schema.fit(model.spec, model.dtype_name)
        check_target(target, self._spec, self.capability)
        self.kv_schema = kv_schema.schema(model.spec, target.block_size, model.dtype_name)
        self._eos = frozenset(model.config.eos if stop_at_eos else ())
        profile = kv_schema.quantization(model.dtype_name)
        check_profile(profile, model.spec)
        tiers = {tier.name: tier.blocks for tier in target.tiers}
        self._workers = {
            worker.name: WorkerMemory(
                worker.name, KVPool(self.kv_schema, tiers, model.dtype, model.device, profile)
            )
            for worker in target.workers
        }
        pool = next(iter(self._workers.values())).pool
        self._kernels = kernel_attention(accel, model.config, model.dtype, target, pool)
        self._sequences: dict[str, Sequence] = {}
        self._pending: list[TokenEvent] = []
        self._stats = EngineStats()
        self.trace: Trace | None = None
        """Records what is run, where one is set."""

    @property
    def capability(self) -> CapabilityDescriptor:
        """See `InferenceBackend`. Tiers other than `device` lie in host memory, of any name."""
        device = self.model.device.type
        return CapabilityDescriptor(
            "embedded",
            device=device if device in DEVICE_KINDS else "cpu",
            dtypes=("float32", "bfloat16", "float16"),
            kv_dtypes=tuple(KV_DTYPES),
            supports_kv_transfer=True,
            max_model_len=self.model.config.max_position,
            supports_logprobs=True,
        )

    def submit(self, request: PlanRequest, sampling: Sampling = Sampling()) -> None:
        """Make a request known.

        Raises:
            SageIRError: it cannot be answered here: no tokens, too long for the pool or the model,
                its id is still running.
        """
        running = self._sequences.get(request.id)
        check_request(request, self.model, self.target, running is not None and not running.finish)
        self.release(request.id)
        self._sequences[request.id] = Sequence(request, sampling, self.model.tokenizer, self._eos)

    def abort(self, request: str) -> None:
        """End a request; its last event comes with the next step."""
        sequence = self._sequence(request)
        if not sequence.finish:
            self._pending.append(sequence.abort())

    def release(self, request: str) -> None:
        """Forget a request and its tables."""
        self._sequences.pop(request, None)
        for worker in self._workers.values():
            worker.release(request)

    def stats(self) -> EngineStats:
        """Counters since the engine was made."""
        return self._stats

    def view(self) -> EngineView:
        """See `InferenceBackend`."""
        views = [sequence.view() for sequence in self._sequences.values()]
        prefixes = [
            worker.cached(view.id, view.computed)
            for worker in self._workers.values()
            for view in views
        ]
        free: dict[tuple[str, str], int] = {}
        for worker in self._workers.values():
            free |= worker.free_blocks()
        return EngineView(
            waiting=tuple(v for v in views if not v.finish and not v.computed),
            running=tuple(v for v in views if not v.finish and v.computed),
            finished=tuple(v for v in views if v.finish),
            cached=tuple(prefix for prefix in prefixes if prefix),
            free=free,
        )

    def stream(self, source: PlanSource) -> Iterator[TokenEvent]:
        """Run a source's steps until it has none left."""
        while (step := source.next_step(self.view())) is not None:
            yield from self.step(step)
        yield from self._drain()

    def execute(self, plan: ExecutionPlan) -> Iterator[TokenEvent]:
        """Submit a plan's requests (greedy, unless submitted before) and run all its steps.

        Raises:
            SageIRError: the plan is for another model, block size or a larger pool.
        """
        check_target(plan.target, self._spec, self.capability, within=self.target)
        for request in plan.requests:
            if request.id not in self._sequences:
                self.submit(request)
        for step in plan.steps:
            yield from self.step(step)
        yield from self._drain()

    def step(self, step: PlanStep) -> list[TokenEvent]:
        """Run one step.

        Raises:
            SageIRError: the step does not fit this engine: an unknown request or worker, a block
                out of range, a table too short for its rows.
        """
        worker = self._worker(step.worker)
        start = time.perf_counter()
        moved = sum(self._move(item, worker) for item in step.kv)
        seconds = time.perf_counter() - start if moved else 0.0
        self._count(steps=1, moved_blocks=moved, move_seconds=seconds)
        for bind in step.binds:
            worker.bind(bind)
        events = self._drain()
        for _ in range(1 if step.prefill else step.loops):
            work = self._work(step)
            if not work:
                break
            events += self._forward(step, worker, work)
        return events

    def export_kv(self, request: str, worker: str) -> KVChunk:
        """The KV of all that a worker has computed of a request, to go on elsewhere.

        Raises:
            SageIRError: the request or worker is unknown, or the worker holds nothing of it.
        """
        sequence = self._sequence(request)
        return pack(self._worker(worker), sequence, self.model.config.name)

    def import_kv(self, chunk: KVChunk, request: str, worker: str, blocks: Seq[int]) -> None:
        """Fill blocks with KV from another engine; a plan then binds them.

        Raises:
            SageIRError: the request or worker is unknown, the chunk is of another schema or not of
                the request's first tokens, or the blocks do not exist or are too few or many.
        """
        sequence = self._sequence(request)
        unpack(chunk, self._worker(worker), sequence, self.model.config.name, blocks)

    def _move(self, item: KVMove | KVFree, worker: WorkerMemory) -> int:
        """Carry out one entry of a step's `kv`; the number of blocks copied."""
        if isinstance(item, KVFree):
            owner = self._worker(item.worker) if item.worker else worker
            owner.free(item)
            return 0
        check_move(item)
        source = self._worker(item.from_worker) if item.from_worker else worker
        source.pool.copy(item.from_tier, item.src, worker.pool, item.to_tier, item.dst)
        worker.hold(item.to_tier, item.dst)
        if self.trace is not None:
            self.trace.moved(worker.name, item)
        return len(item.src)

    def _work(self, step: PlanStep) -> list[Work]:
        """The rows of the next forward of a step."""
        work = []
        for chunk in step.prefill:
            sequence = self._sequence(chunk.request)
            if not 0 <= chunk.start < chunk.stop <= len(sequence.tokens):
                raise SageIRError(
                    Diagnostic(
                        f"step {step.index} runs tokens [{chunk.start}, {chunk.stop}) of request "
                        f"{chunk.request!r}, which has {len(sequence.tokens)}"
                    )
                )
            work.append(Work(sequence, chunk.start, chunk.stop, False))
        for name in step.decode:
            sequence = self._sequence(name)
            if not sequence.finish:
                end = len(sequence.tokens)
                work.append(Work(sequence, end - 1, end, True))
        return work

    def _forward(self, step: PlanStep, worker: WorkerMemory, work: list[Work]) -> list[TokenEvent]:
        """One forward and its tokens."""
        start = time.perf_counter()
        work = ordered(step, worker, work)
        batch = make_batch(step, worker, work, self.model.device, self._kernels)
        logits = self.model.forward(batch, worker.pool.layers)
        if self.trace is not None:
            self.trace.ran(worker.name, _traced(self.trace, worker, work))
        yielding = [row.sequence for row in work if row.yields]
        drawn = draw(logits, [sequence.sampler for sequence in yielding])
        for row in work:
            row.sequence.computed = max(row.sequence.computed, row.stop)
        prefill = sum(row.stop - row.start for row in work if not row.decode)
        self._count(
            forwards=1,
            prefill_tokens=prefill,
            decode_tokens=sum(row.decode for row in work),
            generated=len(drawn),
            forward_seconds=time.perf_counter() - start,
        )
        return [sequence.push(*one) for sequence, one in zip(yielding, drawn, strict=True)]

    def _sequence(self, request: str) -> Sequence:
        if request not in self._sequences:
            raise SageIRError(
                Diagnostic(f"the plan names request {request!r}, which was never submitted")
            )
        return self._sequences[request]

    def _worker(self, name: str) -> WorkerMemory:
        if name not in self._workers:
            raise SageIRError(
                Diagnostic(f"the plan names worker {name!r}; known: {', '.join(self._workers)}")
            )
        return self._workers[name]

    def _drain(self) -> list[TokenEvent]:
        events, self._pending = self._pending, []
        return events

    def _count(self, **more: float) -> None:
        now = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = evolve(self._stats, **now)


def _traced(trace: Trace, worker: WorkerMemory, work: list[Work]) -> Iterator[TraceRow]:
    for row in work:
        name = row.sequence.request.id
        blocks = trace.cut(worker.tables[name].blocks, row.stop)
        yield TraceRow(name, row.start, row.stop, row.decode, blocks)
