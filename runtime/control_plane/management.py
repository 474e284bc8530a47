"""The management API of gateways: what `attach` speaks."""

import json
from typing import Any, Protocol

from attrs import fields
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest

from sagellm_ir.diagnostics import SageIRError, suggest
from sagellm_ir.runtime.control_plane.attach import ENGINES, EngineRecord, Figures
from sagellm_ir.runtime.control_plane.fleet import REPORTED, Fleet

__all__ = ["REPORTS", "add_management", "add_reports"]

REPORTS = "sagellm_reports"
"""The name of the route that takes engines' reports."""
MOST_BYTES = 1 << 20
"""Of a body."""


class Reported(Protocol):
    """A fleet that engines report to: ours, or the Control Plane's."""

    def report(self, engine_id: str, state: str, figures: Figures) -> None:
        """What an engine says of itself; raises `SageIRError` when there is no such engine."""
        ...


def add_reports(app: FastAPI, fleet: Reported) -> None:
    """`PATCH /v1/management/engines/{id}`: an engine's state and load."""

    @app.patch(ENGINES + "/{engine_id}", name=REPORTS)
    async def report(engine_id: str, http: HttpRequest) -> dict[str, str]:
        body = await _object(http)
        if (state := body.get("state")) not in REPORTED:
            raise HTTPException(400, f"state: no {state!r}; {suggest(str(state), REPORTED)}")
        numbers = {one.name: _count(body, one.name) for one in fields(Figures)}
        try:
            fleet.report(engine_id, state, Figures(**numbers))
        except SageIRError as error:
            raise HTTPException(404, error.diagnostics[0].message) from None
        return {"status": "success", "engine_id": engine_id}


def add_management(app: FastAPI, fleet: Fleet) -> None:
    """Register, list, look at and deregister engines."""
    add_reports(app, fleet)

    @app.post(ENGINES + "/register")
    async def register(http: HttpRequest) -> dict[str, Any]:
        try:
            place = fleet.register(_record(await _object(http)))
        except SageIRError as error:
            raise HTTPException(400, error.diagnostics[0].message) from None
        return {"status": "success", **place.describe()}

    @app.get(ENGINES)
    async def engines() -> dict[str, Any]:
        found = [place.describe() for place in fleet.places.values()]
        healthy = sum(engine["is_healthy"] for engine in found)
        return {"engines": found, "total": len(found), "healthy": healthy}

    @app.get(ENGINES + "/{engine_id}")
    async def engine(engine_id: str) -> dict[str, Any]:
        try:
            return fleet.find(engine_id).describe()
        except SageIRError as error:
            raise HTTPException(404, error.diagnostics[0].message) from None

    @app.delete(ENGINES + "/{engine_id}")
    async def unregister(engine_id: str) -> dict[str, str]:
        try:
            fleet.unregister(engine_id)
        except SageIRError as error:
            raise HTTPException(404, error.diagnostics[0].message) from None
        return {"status": "success", "engine_id": engine_id}


async def _object(http: HttpRequest) -> dict[str, Any]:
    raw = b""
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > MOST_BYTES:
            raise HTTPException(413, f"the body has more than {MOST_BYTES} bytes")
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return body


def _record(body: dict[str, Any]) -> EngineRecord:
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise HTTPException(400, "metadata: expected an object")
    port = body.get("port")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 1 << 16:
        raise HTTPException(400, f"port: expected 1 to 65535, got {port!r}")
    return EngineRecord(
        _word(body, "engine_id"),
        _word(body, "model_id"),
        _word(body, "host"),
        port,
        _word(body, "engine_kind", "llm"),
        metadata,
    )


def _word(body: dict[str, Any], name: str, default: str | None = None) -> str:
    value = body.get(name, default)
    if not isinstance(value, str) or not value or len(value) > 256:
        raise HTTPException(400, f"{name}: expected a text of 1 to 256 characters, got {value!r}")
    return value


def _count(body: dict[str, Any], name: str) -> int:
    value = body.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise HTTPException(400, f"{name}: expected a whole number from 0, got {value!r}")
    return value
