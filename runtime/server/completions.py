"""`Completions`: the two endpoints that generate."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from hashlib import blake2b
from itertools import count
from typing import Any, TypeVar

from attrs import evolve, frozen
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response as HttpResponse
from starlette.types import Send

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.request import Request, Sampling, TokenPrompt
from sagellm_ir.runtime.config import LimitsConfig
from sagellm_ir.runtime.engines.answers import Response, StreamDelta, StreamEnd, StreamStart
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from sagellm_ir.runtime.server.access import space
from sagellm_ir.runtime.server.body import Ask, Kind, read_ask, read_json
from sagellm_ir.runtime.server.errors import ApiError, api_error
from sagellm_ir.runtime.server.exchange import Exchange, Exchanges, News
from sagellm_ir.runtime.server.monitoring import Monitor
from sagellm_ir.runtime.server.shapes import ChatShape, CompletionShape, Shape, usage

__all__ = ["DEFAULT_NEW", "SHAPES", "Completions", "Job", "seeded"]

T = TypeVar("T")

DEFAULT_NEW = {"chat": 256, "completion": 16}
"""Tokens of an answer when the body does not say; 16 is OpenAI's."""
SHAPES: dict[Kind, tuple[Callable[..., Shape], str]] = {
    "chat": (ChatShape, "chatcmpl"),
    "completion": (CompletionShape, "cmpl"),
}


@frozen
class Job:
    """One body on its way."""

    ask: Ask
    exchange: Exchange
    shape: Shape


class Completions:
    """Answers `/v1/chat/completions` and `/v1/completions`."""

    def __init__(self, engine: SageLLMEngine, limits: LimitsConfig, monitor: Monitor) -> None:
        self._engine, self._limits, self._monitor = engine, limits, monitor
        self._exchanges = Exchanges()
        self._numbers = count()

    async def answer(self, kind: Kind, http: HttpRequest) -> HttpResponse:
        """One HTTP request.

        Raises:
            ApiError: it is refused, or the engine failed before its first token.
        """
        raw = await http.body()
        ask = read_ask(kind, read_json(raw))
        self._check_model(ask)
        try:
            job = await self._start(kind, ask, http, raw)
            news = job.exchange.follow()
            if not ask.stream:
                return JSONResponse(await _unless_gone(http, self._whole(job, news)))
            head = await _unless_gone(http, _head(news))
        except SageIRError as error:
            raise api_error(error) from None
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _Stream(self._events(job, head, news), headers=headers)

    def _check_model(self, ask: Ask) -> None:
        if ask.model not in (None, self._engine.model_name):
            message = f"there is no model {ask.model!r} here, only {self._engine.model_name!r}"
            raise ApiError(404, message, "model_not_found", param="model")

    async def _start(self, kind: Kind, ask: Ask, http: HttpRequest, raw: bytes) -> Job:
        """Join the exchange of the same request, or begin one."""
        state = http.state
        key = None
        if state.given_id:
            key = (state.tenant, state.request_id, kind, blake2b(raw, digest_size=16).digest())
        exchange = self._exchanges.find(key)
        if exchange is None:
            within = space(state.tenant, ask.salt)
            requests = await self._requests(kind, ask, state.request_id, within)
            exchange = self._exchanges.join(
                key, lambda: Exchange(self._engine, requests, self._monitor.finished)
            )
        make, prefix = SHAPES[kind]
        shape = make(
            f"{prefix}-{state.request_id}",
            self._engine.model_name,
            self._engine.loaded.tokenizer,
            ask.include_usage,
        )
        return Job(ask, exchange, shape)

    async def _requests(
        self, kind: Kind, ask: Ask, request_id: str, within: str | None
    ) -> list[Request]:
        """One a prompt and answer, tokenised."""
        number = next(self._numbers)
        requests: list[Request] = []
        for prompt in ask.prompts:
            first = Request(request_id, prompt=prompt)
            tokens = TokenPrompt(tuple(await self._engine.encode(first)))
            new = self._new_tokens(kind, ask, len(tokens.tokens))
            for seed in range(ask.answers):
                request = Request(
                    f"{request_id}/{number}.{len(requests)}",
                    prompt=tokens,
                    max_new_tokens=new,
                    priority=ask.priority,
                    tenant=within,
                    sampling=seeded(ask.sampling, seed),
                )
                requests.append(request)
        return requests

    def _new_tokens(self, kind: Kind, ask: Ask, prompt: int) -> int:
        """Tokens of an answer to a prompt of so many.

        Raises:
            ApiError: prompt or answer are longer than is allowed.
        """
        param = "messages" if kind == "chat" else "prompt"
        most, room = self._limits.prompt_tokens, self._engine.max_tokens - prompt
        if most is not None and prompt > most:
            message = f"the prompt has {prompt} tokens; this server takes {most}"
            raise ApiError(400, message, "context_length_exceeded", param=param)
        wanted = ask.max_new
        if room < (wanted or 1):
            message = (
                f"the prompt has {prompt} tokens and the answer {wanted or 1} or more; together "
                f"they may have {self._engine.max_tokens}"
            )
            raise ApiError(400, message, "context_length_exceeded", param=param)
        if wanted is not None and wanted > self._limits.new_tokens:
            message = f"max_tokens: expected at most {self._limits.new_tokens}, got {wanted}"
            raise ApiError(400, message, "invalid_value", param="max_tokens")
        return wanted or min(DEFAULT_NEW[kind], self._limits.new_tokens, room)

    async def _whole(self, job: Job, news: AsyncGenerator[News, None]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        found: dict[int, Response] = {}
        async with aclosing(news):
            async for index, event in news:
                if isinstance(event, StreamEnd):
                    found[index] = event.response
        responses = [found[index] for index in sorted(found)]
        return job.shape.whole(responses, usage(responses, job.ask.answers))

    async def _events(
        self, job: Job, head: list[News], news: AsyncGenerator[News, None]
    ) -> AsyncIterator[str]:
        """The lines of a stream."""
        found: dict[int, Response] = {}
        async with aclosing(news):
            try:
                async for index, event in _chained(head, news):
                    if isinstance(event, StreamStart):
                        chunk = job.shape.opening(index)
                    elif isinstance(event, StreamDelta):
                        chunk = job.shape.delta(index, event)
                    else:
                        found[index] = event.response
                        chunk = job.shape.closing(index, event.response)
                    if chunk is not None:
                        yield _line(chunk)
            except SageIRError as error:
                yield _line(api_error(error).body())
                raise _Cut from error
        if job.ask.include_usage:
            responses = [found[index] for index in sorted(found)]
            yield _line(job.shape.tail(usage(responses, job.ask.answers)))
        yield "data: [DONE]\n\n"


class _Cut(Exception):
    """A stream cannot go on."""


class _Stream(StreamingResponse):
    """Server-sent events. One that cannot go on ends without its end, so that readers notice."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        with suppress(_Cut):
            await super().stream_response(send)


async def _chained(head: list[News], rest: AsyncIterator[News]) -> AsyncIterator[News]:
    for item in head:
        yield item
    async for item in rest:
        yield item


async def _head(news: AsyncGenerator[News, None]) -> list[News]:
    """What happens up to the first token: until then an error can still have its own status."""
    head = []
    async for item in news:
        head.append(item)
        if not isinstance(item[1], StreamStart):
            break
    return head


async def _unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, given up when the client leaves.

    Raises:
        ApiError: it has left; nobody will read this.
    """

    async def leaving() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(leaving())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ApiError(499, "the client has left", "client_closed_request")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def seeded(sampling: Sampling, number: int) -> Sampling:
    """Seeds count up over the answers to a prompt, so that they differ."""
    if sampling.seed is None or not number:
        return sampling
    return evolve(sampling, seed=sampling.seed + number)


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
