"""`create_app`: the OpenAI API, health, metrics and the live plan of one engine."""

import time
from importlib import metadata
from typing import Any

from attrs import asdict
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from sagellm_ir.diagnostics import suggest
from sagellm_ir.runtime.config import LimitsConfig, ServerConfig
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from sagellm_ir.runtime.server.access import Access, error_response
from sagellm_ir.runtime.server.completions import Completions
from sagellm_ir.runtime.server.errors import DRAIN_RETRY, ApiError
from sagellm_ir.runtime.server.monitoring import Monitor
from sagellm_ir.runtime.server.plan_view import plan_view

__all__ = ["add_errors", "create_app"]

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    engine: SageLLMEngine, server: ServerConfig | None = None, limits: LimitsConfig | None = None
) -> FastAPI:
    """An ASGI application around a started engine. It neither starts nor stops it.

    Args:
        engine: what answers.
        server: who may ask.
        limits: how much they may ask for.
    """
    server, limits = server or ServerConfig(), limits or LimitsConfig()
    monitor = Monitor(engine)
    # Bodies are read by `read_ask`, so that errors have OpenAI's form: there is no schema to show.
    app = FastAPI(title="sagellm-ir", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        Access, keys=server.api_keys, body_bytes=limits.body_bytes, answered=monitor.answered
    )
    add_errors(app)
    _add_openai(app, engine, Completions(engine, limits, monitor))
    _add_state(app, engine, monitor)
    return app


def add_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    async def on_api_error(_: HttpRequest, error: Exception) -> HttpResponse:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def on_http_error(http: HttpRequest, error: Exception) -> HttpResponse:
        assert isinstance(error, HTTPException)
        path, message = http.url.path, error.detail
        if (error.status_code, message) == (404, "Not Found"):
            paths = {route.path for route in app.routes if isinstance(route, Route)}
            message = f"there is no {path} here; {suggest(path, paths)}"
        elif error.status_code == 405:
            message = f"{path} does not take {http.method}"
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    async def on_bug(_: HttpRequest, __: Exception) -> HttpResponse:
        return error_response(ApiError(500, "this server failed; its log says why"))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)


def _add_openai(app: FastAPI, engine: SageLLMEngine, completions: Completions) -> None:
    started = int(time.time())

    def model() -> dict[str, Any]:
        return {
            "id": engine.model_name,
            "object": "model",
            "created": started,
            "owned_by": "sagellm",
            "max_model_len": engine.max_tokens,
        }

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(http: HttpRequest) -> HttpResponse:
        return await completions.answer("chat", http)

    @app.post("/v1/completions", response_model=None)
    async def complete(http: HttpRequest) -> HttpResponse:
        return await completions.answer("completion", http)

    @app.post("/v1/embeddings", response_model=None)
    async def embed() -> HttpResponse:
        message = f"{engine.model_name!r} generates text; this engine makes no embeddings"
        raise ApiError(400, message, "not_supported")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != engine.model_name:
            raise ApiError(404, f"there is no model {name!r} here", "model_not_found")
        return model()


def _add_state(app: FastAPI, engine: SageLLMEngine, monitor: Monitor) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the engine works: also while it drains."""
        if not await engine.health_check():
            raise ApiError(503, f"engine {engine.engine_id!r} does not run", "engine_failed")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether new requests are welcome."""
        await health()
        if engine.draining:
            wait = {"Retry-After": str(DRAIN_RETRY)}
            raise ApiError(503, "the engine is shutting down", "engine_draining", headers=wait)
        return {"status": "ready"}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return {
            "engine_id": engine.engine_id,
            "model": engine.model_name,
            "max_model_len": engine.max_tokens,
            "version": metadata.version("sagellm-ir"),
            "pipeline": engine.pipeline,
            "draining": engine.draining,
            "capability": asdict(engine.get_capability()),
            "target": asdict(engine.loaded.target),
            "load": asdict(engine.load()),
            "metrics": asdict(engine.metrics()),
        }

    @app.get("/metrics", response_model=None)
    async def metrics() -> HttpResponse:
        return HttpResponse(monitor.text(), media_type=_METRICS_TYPE)

    @app.get("/plan", response_model=None)
    async def plan(http: HttpRequest) -> HttpResponse:
        """What was compiled last, and what decodes; null before the first request."""
        current = engine.plan
        if current is None:
            return JSONResponse(None)
        return JSONResponse(plan_view(current, engine.decoding, http.state.tenant))
