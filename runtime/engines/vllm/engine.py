"""`VLLMBackendAdapter`: stock vLLM as an `InferenceBackend`, in this process."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import define, evolve
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.backend import (
    EngineStats,
    EngineView,
    Finish,
    Likelihood,
    PlanSource,
    TokenEvent,
)
from sagellm_ir.runtime.engines.vllm.blocks import to_plan
from sagellm_ir.runtime.engines.vllm.connector import worker_tables
from sagellm_ir.runtime.engines.vllm.scheduler import PlanScheduler
from sagellm_ir.runtime.engines.vllm.targets import PLAN_NAME, stored_as
from sagellm_ir.runtime.engines.vllm.versions import check_version
from sagellm_ir.runtime.protocols import CapabilityDescriptor
from sagellm_ir.runtime.trace import Trace, TraceRow
from sagellm_ir.target import Target

__all__ = ["BLOCK_MULTIPLES", "VLLMBackendAdapter"]

BLOCK_MULTIPLES = {"cpu": 32}
"""A block's tokens must be a multiple of this, by device; 16 on others."""
_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length"}


@define
class _Client:
    """A submitted request, and what was handed out of its answer."""

    request: PlanRequest
    logprobs: int | None
    given: int = 0
    finish: Finish | None = None


class VLLMBackendAdapter:
    """One vLLM engine whose scheduler is `PlanScheduler`. It runs nothing but what it is given.

    Where vLLM schedules asynchronously, a step may begin while the one before runs.

    Decode rows of requests that have ended are skipped. Prefill chunks always run: other requests
    may share the blocks they fill.

    Args:
        engine: vLLM's `LLMEngine`, its core in this process; see `make_engine`.
        stop_at_eos: end an answer at the model's end token; else at the planned length.
    """

    def __init__(self, engine: Any, *, stop_at_eos: bool = True) -> None:
        self.engine = engine
        core = engine.engine_core.engine_core
        self.scheduler: PlanScheduler = core.scheduler
        self.scheduler.driven = True
        self.depth: int = core.batch_queue_size
        """See `InferenceBackend`: 2 where vLLM schedules asynchronously."""
        self._stop_at_eos = stop_at_eos
        self._clients: dict[str, _Client] = {}
        self._flight: deque[int] = deque()
        """The number of the last forward of each step in flight."""
        self._made: deque[tuple[int, TokenEvent]] = deque()
        """Tokens that were not taken, and the number of their forward."""
        self._pending: list[TokenEvent] = []
        self._seconds = self._seen = 0.0
        self.trace: Trace | None = None
        """Records what vLLM's worker ran, where one is set."""

    @property
    def target(self) -> Target:
        """What vLLM was made for; speeds are those of the default target."""
        return self.scheduler.target

    @property
    def capability(self) -> CapabilityDescriptor:
        """See `InferenceBackend`. Plans need not know of the block that vLLM keeps for itself."""
        from vllm.platforms import current_platform

        config = self.engine.vllm_config
        device = current_platform.device_type
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        return CapabilityDescriptor(
            "vllm",
            device=device,
            device_name=current_platform.get_device_name(),
            dtypes=(dtype,),
            kv_dtypes=(stored_as(config),),
            tiers=tuple(tier.name for tier in self.target.tiers),
            block_size_multiple=BLOCK_MULTIPLES.get(device, 16),
            max_model_len=config.model_config.max_model_len,
            max_tp=self.target.tp,
            prefix_groups=self.scheduler.takes_groups or self.scheduler.reads_once,
            supports_stop_strings=not config.model_config.skip_tokenizer_init,
            # These ignore seeds on a CPU in a batch that holds requests without one.
            supports_seed=device != "cpu" or check_version() not in ("0.26.0", "0.27.0"),
            supports_logprobs=True,
        )

    def submit(self, request: PlanRequest, sampling: Sampling = Sampling()) -> None:
        """Make a request known to vLLM, where it waits for steps.

        Raises:
            SageIRError: vLLM cannot answer it: no tokens, too long, an adapter, its id is running,
                or sampling parameters that vLLM refuses.
        """
        before = self._clients.get(request.id)
        if before is not None and not before.finish:
            raise _refused(request, "it is running already: ids are unique")
        if request.adapter is not None:
            raise _refused(request, f"it wants adapter {request.adapter!r}; none can be loaded")
        if not request.tokens or len(request.tokens) != request.prompt_len:
            raise _refused(request, f"its {request.prompt_len} prompt positions have no tokens")
        longest = request.prompt_len + request.max_new_tokens
        most = self.engine.vllm_config.model_config.max_model_len
        if longest > most:
            raise _refused(request, f"it may grow to {longest} tokens; vLLM's limit is {most}")
        self.release(request.id)
        try:
            self.engine.add_request(
                request.id,
                {"prompt_token_ids": list(request.tokens)},
                self._sampling(request, sampling),
            )
        except (ValueError, VLLMValidationError) as error:
            raise _refused(request, str(error)) from error
        self._clients[request.id] = _Client(request, sampling.logprobs)

    def stream(self, source: PlanSource) -> Iterator[TokenEvent]:
        """Run a source's steps, one at a time, until it has none left."""
        while (step := source.next_step(self.view())) is not None:
            yield from self.step(step)
        yield from self._drain()

    def step(self, step: PlanStep) -> list[TokenEvent]:
        """Run one step; the tokens it made.

        Raises:
            SageIRError: as `begin`.
        """
        self.begin(step)
        return self.take()

    def begin(self, step: PlanStep) -> None:
        """Ask vLLM for the forwards of a step. It runs forwards and copies in order.

        Raises:
            SageIRError: the step does not fit this engine: an unknown request or worker, a block
                out of range, a table too short for its rows, more rows than vLLM was made for.
        """
        self.scheduler.give(step)
        while self.scheduler.busy:
            self._tick()
        self._flight.append(self.scheduler.asked)

    def take(self) -> list[TokenEvent]:
        """The tokens of the oldest step in flight, behind the last events of aborted requests."""
        events, last = self._drain(), self._flight.popleft()
        while self.scheduler.answered < last:
            self._tick()
        while self._made and self._made[0][0] <= last:
            events.append(self._made.popleft()[1])
        return events

    def view(self) -> EngineView:
        """See `InferenceBackend`."""
        return self.scheduler.view()

    def abort(self, request: str) -> None:
        """End a request; its last event comes with the next step."""
        client = self._clients.get(request)
        if client is None:
            raise SageIRError(Diagnostic(f"request {request!r} was never submitted"))
        if not client.finish:
            client.finish = "abort"
            self._leave(request)
            self._pending.append(TokenEvent(request, None, "", client.given, "abort"))

    def release(self, request: str) -> None:
        """Forget a request and its table."""
        client = self._clients.pop(request, None)
        if client is not None:
            if not client.finish:
                self._leave(request)
            self.scheduler.release(request)

    def stats(self) -> EngineStats:
        """Counters since the engine was made; the seconds are those in which a forward was in flight."""
        return evolve(self.scheduler.stats, forward_seconds=self._seconds)

    def close(self) -> None:
        """End the engine and its workers."""
        self.engine.engine_core.shutdown()

    def __enter__(self) -> "VLLMBackendAdapter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tick(self) -> None:
        """Let vLLM do what it does next: ask for a forward, wait for one, or both."""
        scheduler = self.scheduler
        if scheduler.asked == scheduler.answered:
            self._seen = time.perf_counter()
        outputs = self.engine.step()
        before, self._seen = self._seen, time.perf_counter()
        self._seconds += self._seen - before
        self._record()
        for output in outputs:
            self._made += ((scheduler.answered, event) for event in self._events(output))

    def _leave(self, request: str) -> None:
        """Have no more tokens of a request, nor tell those that were not taken."""
        self.engine.abort_request([request])
        self._made = deque(made for made in self._made if made[1].request != request)

    def _drain(self) -> list[TokenEvent]:
        events, self._pending = self._pending, []
        return events

    def _record(self) -> None:
        """Report the forward just asked for, with the block tables that vLLM's (first) worker runs it with."""
        steps = self.scheduler.steps
        moves, steps.moves = steps.moves, []
        rows, self.scheduler.ran = self.scheduler.ran, []
        if self.trace is None:
            return
        worker = self.scheduler.ledger.worker
        for move in moves:
            self.trace.moved(worker, move)
        if not rows:
            return
        tables = self.engine.collective_rpc(worker_tables)[0]
        self.trace.ran(
            worker,
            [
                TraceRow(
                    row.sequence.name,
                    row.start,
                    row.stop,
                    row.decode,
                    self.trace.cut(to_plan(tables[row.sequence.request.request_id]), row.stop),
                )
                for row in rows
            ],
        )

    def _events(self, output: Any) -> Iterator[TokenEvent]:
        """The tokens of one of vLLM's outputs; its text comes with the last of them."""
        client = self._clients[output.request_id]
        made = output.outputs[0]
        if output.finished:
            client.finish = _FINISHES.get(made.finish_reason, "abort")
            self.scheduler.sequences[output.request_id].finish = client.finish
        tokens: list[int | None] = [*made.token_ids] or [None]
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            yield TokenEvent(
                output.request_id,
                token,
                made.text if last else "",
                client.given,
                client.finish if last else None,
                None
                if token is None or not made.logprobs
                else _likelihood(token, made.logprobs[place], client.logprobs or 0),
            )
            client.given += token is not None

    def _sampling(self, request: PlanRequest, sampling: Sampling) -> SamplingParams:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=list(sampling.stop),
            max_tokens=request.max_new_tokens,
            ignore_eos=not self._stop_at_eos,
            output_kind=RequestOutputKind.DELTA,
            logprobs=sampling.logprobs,
            extra_args={PLAN_NAME: request.id},
        )


def _likelihood(token: int, found: Mapping[int, Any], count: int) -> Likelihood:
    """Of vLLM's record of one place: the token's own entry, and the `count` likeliest."""
    ranked = sorted(found.items(), key=lambda entry: -entry[1].logprob)
    top = tuple((other, entry.logprob) for other, entry in ranked[:count])
    return Likelihood(found[token].logprob, top)


def _refused(request: PlanRequest, why: str) -> SageIRError:
    return SageIRError(Diagnostic(f"request {request.id!r} cannot run: {why}"))
