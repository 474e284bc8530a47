"""`SageLLMEngine`: any of our backends behind one asynchronous face."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from attrs import evolve

from sagellm_ir.build import chat_tokens
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import ExecutionPlan, PlanRequest
from sagellm_ir.request import ChatPrompt, Request, TextPrompt, TokenPrompt
from sagellm_ir.runtime.backend import TokenEvent
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.answers import (
    Response,
    StreamDelta,
    StreamEnd,
    StreamEvent,
    StreamStart,
)
from sagellm_ir.runtime.engines.loop import EngineLoop
from sagellm_ir.runtime.engines.metrics import Load, Meter, Metrics
from sagellm_ir.runtime.engines.tickets import Ended
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.runtime.protocols import CapabilityDescriptor
from sagellm_ir.target import DEVICE

__all__ = ["SageLLMEngine"]


class SageLLMEngine:
    """Serves concurrent requests on one backend, planned together step by step.

    Requests that share a prefix compute it once, unless their tenants or adapters differ: those
    are part of a block's identity. Coroutines of any event loop may use one engine.

    Args:
        loaded: the backend; from here on it is used by the engine's thread only.
        engine_id: its name in a fleet.
        pipeline: the passes of the online planner.
        reserve: tokens of an answer to plan at a time (see `OnlinePlanner`).
        max_loops: forwards of one step, at most. Tokens are sent, and new requests looked at, after
            each step; with more there are fewer and shorter plans. One, where the backend holds
            several steps in flight: a step is then planned while the one before runs.
        max_waiting: requests without a first step; one more is refused with `EngineBusy`.
    """

    def __init__(
        self,
        loaded: LoadedBackend,
        *,
        engine_id: str = "sagellm-0",
        pipeline: str = "O2",
        reserve: int | None = None,
        max_loops: int = 1,
        max_waiting: int = 256,
    ) -> None:
        self.engine_id = engine_id
        self.pipeline = pipeline
        self.loaded = loaded
        self._meter = Meter(loaded.target)
        loops = 1 if loaded.backend.depth > 1 else min(max_loops, loaded.target.max_loops)
        target = evolve(loaded.target, max_loops=loops)
        planner = OnlinePlanner(target, pipeline, reserve=reserve, spill=loaded.spill)
        self._loop = EngineLoop(engine_id, loaded.backend, planner, self._meter, max_waiting)

    @property
    def model_name(self) -> str:
        """The model that answers."""
        return self.loaded.model_name

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and answer together, at most."""
        tier, limit = self.loaded.target.tier(DEVICE), self.get_capability().max_model_len
        pool = tier.blocks * self.loaded.target.block_size if tier else 0
        return pool if limit is None else min(pool, limit)

    @property
    def plan(self) -> ExecutionPlan | None:
        """What was compiled last: the prompts that came last, and what follows them."""
        return self._loop.plan

    @property
    def decoding(self) -> tuple[PlanRequest, ...]:
        """Requests whose answers are under way."""
        return self._loop.decoding

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._loop.closed

    def start(self) -> None:
        """Begin to serve."""
        self._loop.start()

    def stop(self) -> None:
        """Fail what still runs, and end the thread. Blocks for the rest of a step."""
        self._loop.stop()

    async def drain(self, seconds: float | None = None) -> bool:
        """Take nothing new, and wait for what runs; whether all of it ended in time."""
        self._loop.close()
        end = None if seconds is None else time.monotonic() + seconds
        while self._loop.unfinished:
            if end is not None and time.monotonic() > end:
                return False
            await asyncio.sleep(0.02)
        return True

    async def execute(self, request: Request) -> Response:
        """The whole answer.

        Raises:
            SageIRError: as `stream`.
        """
        async with aclosing(self.stream(request)) as events:
            async for event in events:
                if isinstance(event, StreamEnd):
                    return event.response
        raise AssertionError("a stream ends with StreamEnd")

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The answer token by token: `StreamStart`, `StreamDelta`s, `StreamEnd`.

        Closing the iterator early, or cancelling its task, aborts the request and gives its
        blocks back. An aborted request (`abort`) ends with `finish="abort"`.

        Raises:
            SageIRError: the request cannot be answered here.
            EngineBusy, EngineDraining, EngineFailed: nor can others, now or ever.
        """
        tokens = await self.encode(request)
        ticket = self._loop.submit(_plan_request(request, tokens))
        made: list[TokenEvent] = []
        ended = False
        try:
            yield StreamStart(request.id, self.engine_id, len(tokens))
            while not isinstance(news := await ticket.news.get(), Ended):
                if isinstance(news, SageIRError):
                    ended = True
                    raise news
                assert news.token is not None
                made.append(news)
                yield StreamDelta(request.id, news.token, news.text, news.index, news.likelihood)
            ended = True
        finally:
            if not ended:
                self._loop.abandon(ticket)
        yield StreamEnd(request.id, _response(request, len(tokens), made, news))

    async def encode(self, request: Request) -> Sequence[int]:
        """The prompt's token ids.

        Raises:
            SageIRError: text without a tokenizer, a refused conversation, a prompt of a trace.
        """
        prompt = request.prompt
        if isinstance(prompt, TokenPrompt):
            return prompt.tokens
        tokenizer = self.loaded.tokenizer
        if not isinstance(prompt, TextPrompt | ChatPrompt):
            raise _refused(request, "a trace has no tokens to answer", "replay it on the simulator")
        if tokenizer is None:
            raise _refused(request, "the model has no tokenizer", "give the prompt as token ids")
        if isinstance(prompt, ChatPrompt):
            return await asyncio.to_thread(chat_tokens, tokenizer, prompt)
        return await asyncio.to_thread(tokenizer.encode, prompt.text)

    def abort(self, request_id: str) -> bool:
        """End a request; its stream ends with `finish="abort"`. Whether it was running."""
        return self._loop.abort(request_id)

    async def health_check(self) -> bool:
        """Whether requests can be answered: started, not stopped, not broken."""
        return self._loop.alive

    def get_capability(self) -> CapabilityDescriptor:
        """What the backend can run."""
        return self.loaded.backend.capability

    def metrics(self) -> Metrics:
        """Figures of the last requests and of the cache."""
        return self._meter.metrics()

    def load(self) -> Load:
        """Queue, blocks and totals as of the last step."""
        return self._meter.load()


def _plan_request(request: Request, tokens: Sequence[int]) -> PlanRequest:
    return PlanRequest(
        request.id,
        max_new_tokens=request.max_new_tokens,
        arrival=request.arrival,
        priority=request.priority,
        deadline=request.deadline,
        adapter=request.adapter,
        tenant=request.tenant,
        session=request.session,
        prompt_len=len(tokens),
        tokens=tuple(tokens),
        sampling=request.sampling,
    )


def _response(
    request: Request, prompt_tokens: int, made: Sequence[TokenEvent], ended: Ended
) -> Response:
    return Response(
        request.id,
        "".join(event.text for event in made),
        tuple(event.token for event in made if event.token is not None),
        prompt_tokens,
        ended.cached_tokens,
        (made[-1].finish if made else None) or "abort",
        ended.metrics,
        tuple(event.likelihood for event in made if event.likelihood),
    )


def _refused(request: Request, why: str, help_: str) -> SageIRError:
    return SageIRError(Diagnostic(f"request {request.id!r}: {why}", help=help_))
