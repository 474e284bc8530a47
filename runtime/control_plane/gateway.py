"""`create_gateway`: our own gateway, for where SAGE's packages are not.

The same contract as SAGE's: the OpenAI API for clients, the management API for engines. All of a
request reaches its engine: SAGE's gateway drops `stop`, `seed`, `top_k`, `n` and others.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from hashlib import blake2b
from itertools import count
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest

from sagellm_ir.request import Request
from sagellm_ir.runtime.config import LimitsConfig, ServerConfig
from sagellm_ir.runtime.control_plane.fleet import Fleet
from sagellm_ir.runtime.control_plane.management import add_management
from sagellm_ir.runtime.control_plane.routing import accelerators
from sagellm_ir.runtime.engines.answers import (
    Response,
    StreamDelta,
    StreamEnd,
    StreamEvent,
    StreamStart,
)
from sagellm_ir.runtime.server.access import Access, space
from sagellm_ir.runtime.server.app import add_errors
from sagellm_ir.runtime.server.body import Ask, Kind
from sagellm_ir.runtime.server.completions import DEFAULT_NEW, SHAPES, Completions, Job, seeded
from sagellm_ir.runtime.server.errors import ApiError
from sagellm_ir.runtime.server.exchange import Exchange, Exchanges

__all__ = ["create_gateway"]

UNKNOWN = 0
"""Stands for tokens whose ids an engine does not tell."""
ACCELERATOR = "X-Accelerator"
"""The header that asks for a kind of device, or `domestic`."""


def create_gateway(
    fleet: Fleet, server: ServerConfig | None = None, limits: LimitsConfig | None = None
) -> FastAPI:
    """An ASGI application in front of a fleet, which it neither starts nor stops.

    Args:
        fleet: the engines; more register by the management API.
        server: who may ask: its keys are for clients and engines alike.
        limits: how much they may ask for.
    """
    server, limits = server or ServerConfig(), limits or LimitsConfig()
    app = FastAPI(title="sagellm-ir gateway", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        Access, keys=server.api_keys, body_bytes=limits.body_bytes, answered=lambda _: None
    )
    add_errors(app)
    add_management(app, fleet)
    _add_openai(app, fleet, _FleetCompletions(fleet, limits))
    return app


def _add_openai(app: FastAPI, fleet: Fleet, completions: Completions) -> None:
    started = int(time.time())
    app.post("/v1/chat/completions", response_model=None)(partial(completions.answer, "chat"))
    app.post("/v1/completions", response_model=None)(partial(completions.answer, "completion"))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        found = [
            {"id": name, "object": "model", "created": started, "owned_by": "sagellm"}
            for name in fleet.models()
        ]
        return {"object": "list", "data": found}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether a request would find an engine."""
        if not fleet.models():
            raise ApiError(503, "no engine is ready", "no_engine")
        return {"status": "ready"}


class _FleetCompletions(Completions):
    """The endpoints that generate, answered by a fleet instead of one engine."""

    def __init__(self, fleet: Fleet, limits: LimitsConfig) -> None:
        self._fleet, self._limits = fleet, limits
        self._exchanges, self._numbers = Exchanges(), count()

    def _check_model(self, ask: Ask) -> None:
        served = self._fleet.models()
        if not served:
            raise ApiError(503, "no engine is ready", "no_engine", headers={"Retry-After": "5"})
        if ask.model not in served and not (ask.model is None and len(served) == 1):
            message = f"there is no model {ask.model!r} here, only {', '.join(map(repr, served))}"
            raise ApiError(404, message, "model_not_found", param="model")
        if ask.sampling.logprobs is not None:
            message = "logprobs: a gateway does not pass them on; ask an engine itself"
            raise ApiError(400, message, "not_supported", param="logprobs")

    async def _start(self, kind: Kind, ask: Ask, http: HttpRequest, raw: bytes) -> Job:
        state = http.state
        model = ask.model or self._fleet.models()[0]
        wanted = http.headers.get(ACCELERATOR)
        prefer = accelerators(wanted) if wanted else ()
        key = None
        if state.given_id:
            key = (state.tenant, state.request_id, kind, blake2b(raw, digest_size=16).digest())
        requests = self._asked(kind, ask, state.request_id, space(state.tenant, ask.salt))
        answers = _Answers(self._fleet, model, prefer)
        exchange = self._exchanges.join(key, lambda: Exchange(answers, requests, lambda _: None))
        make, prefix = SHAPES[kind]
        shape = make(f"{prefix}-{state.request_id}", model, None, ask.include_usage)
        return Job(ask, exchange, shape)

    def _asked(self, kind: Kind, ask: Ask, request_id: str, within: str | None) -> list[Request]:
        """One a prompt and answer, as the client wrote it: engines have the tokenizers."""
        new = ask.max_new or min(DEFAULT_NEW[kind], self._limits.new_tokens)
        if new > self._limits.new_tokens:
            message = f"max_tokens: expected at most {self._limits.new_tokens}, got {new}"
            raise ApiError(400, message, "invalid_value", param="max_tokens")
        number = next(self._numbers)
        several = [(prompt, seed) for prompt in ask.prompts for seed in range(ask.answers)]
        return [
            Request(
                f"{request_id}/{number}.{at}",
                prompt=prompt,
                max_new_tokens=new,
                priority=ask.priority,
                tenant=within,
                sampling=seeded(ask.sampling, seed),
            )
            for at, (prompt, seed) in enumerate(several)
        ]


class _Answers:
    """A fleet's answers of one model as an engine's events."""

    def __init__(self, fleet: Fleet, model: str, prefer: tuple[str, ...]) -> None:
        self._fleet, self._model, self._prefer = fleet, model, prefer

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """`StreamStart`, `StreamDelta`s, `StreamEnd`, as of one engine."""
        yield StreamStart(request.id, self._model, 0)
        text, tokens = "", list[int]()
        async with aclosing(self._fleet.stream(request, self._model, self._prefer)) as pieces:
            async for piece in pieces:
                if piece.text or piece.tokens:
                    made = piece.tokens or (UNKNOWN,)
                    yield StreamDelta(request.id, made[-1], piece.text, len(tokens))
                    text, tokens = text + piece.text, [*tokens, *made]
                if piece.finish is not None:
                    usage = piece.usage
                    if usage is not None:
                        tokens = (tokens + [UNKNOWN] * usage.completion_tokens)[
                            : usage.completion_tokens
                        ]
                    yield StreamEnd(
                        request.id,
                        Response(
                            request.id,
                            text,
                            tuple(tokens),
                            usage.prompt_tokens if usage else 0,
                            usage.cached_tokens if usage else 0,
                            piece.finish,
                        ),
                    )
