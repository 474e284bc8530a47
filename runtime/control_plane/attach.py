"""An engine that is served over HTTP, made known to a running gateway, and kept known.

The contract is the gateway's management API, and needs none of its packages:

    POST   /v1/management/engines/register   {engine_id, model_id, host, port, engine_kind, metadata}
    GET    /v1/management/engines/{id}       200, or 404 when the gateway has lost it (a restart)
    PATCH  /v1/management/engines/{id}       {state, queue_length, kv_cache_usage_bytes, ...}
    DELETE /v1/management/engines/{id}

PATCH is ours: gateways that `sagellm-ir gateway start` runs have it, a stock one answers 405. There
a heartbeat is the GET, and an engine that drains deregisters at once, as the stock gateway has no
other way to send it no more requests.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from attrs import asdict, field, frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.control_plane.client import checked_url
from sagellm_ir.runtime.protocols import CapabilityDescriptor

__all__ = ["ENGINES", "Attachment", "EngineRecord", "Figures", "attach_server", "engine_metadata"]

ENGINES = "/v1/management/engines"
TIMEOUT = 10.0
DUPLICATE = 400
GONE = 404
NO_SUCH_METHOD = 405

logger = logging.getLogger(__name__)


@frozen
class EngineRecord:
    """How a gateway reaches an engine, and what it should know of it."""

    engine_id: str
    model: str
    host: str
    port: int
    kind: str = "llm"
    """What the Control Plane routes chat to; the engine's own kind is in the metadata."""
    metadata: Mapping[str, Any] = field(factory=dict)


@frozen
class Figures:
    """How busy an engine is: fields of the Control Plane's `EngineInfo`."""

    active_requests: int = 0
    queue_length: int = 0
    kv_cache_usage_bytes: int = 0
    kv_cache_capacity_bytes: int = 0


def engine_metadata(
    kind: str,
    capability: CapabilityDescriptor,
    *,
    instance_type: str = "general",
    kv_schema: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What an engine tells a Control Plane about itself, as plain data.

    Args:
        kind: "sagellm", "vllm", "lmdeploy", ...
        capability: what it can run; its `device` is what accelerator preference looks at.
        instance_type: "general", "prefilling" or "decoding".
        kv_schema: the layout of its KV pages.
    """
    return {
        "engine": kind,
        "instance_type": instance_type,
        "capability": asdict(capability),
        "domestic_accelerator": capability.is_domestic,
        "kv_schema": dict(kv_schema or {}),
    }


class Attachment:
    """Keeps an engine registered with a gateway until `close`.

    Args:
        gateway: its base URL.
        record: the engine.
        figures: asked at every heartbeat.
        interval: seconds between heartbeats.
        api_key: sent as a bearer token.
    """

    def __init__(
        self,
        gateway: str,
        record: EngineRecord,
        *,
        figures: Callable[[], Figures] = Figures,
        interval: float = 5.0,
        api_key: str | None = None,
    ) -> None:
        self.record = record
        self.state = "STARTING"
        self._figures, self._interval = figures, interval
        self._headers = _bearer(api_key)
        self._gateway = checked_url(gateway).rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self._gateway, headers=self._headers, timeout=TIMEOUT
        )
        self._beat: asyncio.Task[None] | None = None
        self._patches = True
        """Whether the gateway has the route for reports, as far as is known."""

    async def open(self, *, patient: bool = False) -> None:
        """Register the engine, which is ready, and begin the heartbeat.

        Args:
            patient: when no gateway answers, register at a later beat, when one does.

        Raises:
            SageIRError: the gateway cannot be reached, or refuses.
        """
        self.state = "READY"
        try:
            await self._register()
        except BaseException as error:
            if not (patient and isinstance(error, _Unreachable)):
                await self._http.aclose()
                raise
        self._beat = asyncio.create_task(self._keep())

    async def drain(self) -> None:
        """Get no more requests; those under way may end. A gateway that is gone is no error."""
        self.state = "DRAINING"
        if self._beat is not None:
            self._beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beat
        with contextlib.suppress(SageIRError):
            if await self._patch() is not None:
                await self._delete()

    async def close(self) -> None:
        """Deregister."""
        if self.state != "DRAINING":
            await self.drain()
        self.state = "STOPPED"
        with contextlib.suppress(SageIRError):
            await self._delete()
        await self._http.aclose()

    def deregister(self) -> None:
        """Deregister after the event loop has ended. A gateway that is gone is no error."""
        self.state = "STOPPED"
        with contextlib.suppress(httpx.HTTPError):
            url = f"{self._gateway}{ENGINES}/{self.record.engine_id}"
            httpx.delete(url, headers=self._headers, timeout=TIMEOUT)

    async def beat(self) -> None:
        """One heartbeat: figures and state to the gateway; registers anew if it forgot us.

        Raises:
            SageIRError: the gateway cannot be reached, or does not take them.
        """
        refusal = await self._patch()
        if refusal is None:
            return
        known = await self._send("GET", f"{ENGINES}/{self.record.engine_id}")
        if known.status_code == GONE and self.state == "READY":
            await self._register()
        elif self._patches or known.is_error:
            message = f"the gateway at {self._gateway} did not take a heartbeat of engine"
            raise SageIRError(Diagnostic(f"{message} {self.record.engine_id!r}: {refusal}"))

    async def _keep(self) -> None:
        """Heartbeats until it is cancelled, whatever becomes of one: the next may go well."""
        trouble = ""
        while True:
            await asyncio.sleep(self._interval)
            before, trouble = trouble, ""
            try:
                await self.beat()
            except SageIRError as error:
                trouble = error.diagnostics[0].message
                if trouble != before:  # said once, not at every beat
                    logger.warning("%s", trouble)
            except Exception:
                logger.exception("a heartbeat of engine %s failed", self.record.engine_id)
            else:
                if before:
                    logger.warning("the gateway at %s takes heartbeats again", self._gateway)

    async def _register(self) -> None:
        record, body = self.record, _registration(self.record, verified=True)
        reply = await self._send("POST", f"{ENGINES}/register", body)
        if reply.status_code == DUPLICATE and await self._known_here():
            # From before a crash: what it says may be out of date.
            await self._delete()
            reply = await self._send("POST", f"{ENGINES}/register", body)
        if reply.is_error:
            raise SageIRError(
                Diagnostic(
                    f"the gateway at {self._gateway} refused engine {record.engine_id!r}: "
                    f"{reply.status_code} {reply.text[:200]}"
                )
            )
        self._patches = True  # it may be another gateway than before

    async def _known_here(self) -> bool:
        """Whether the gateway has an engine of this id at this engine's own address."""
        known = await self._send("GET", f"{ENGINES}/{self.record.engine_id}")
        if known.is_error:
            return False
        found = known.json()
        return (found.get("host"), found.get("port")) == (self.record.host, self.record.port)

    async def _patch(self) -> str | None:
        """Tell the gateway state and figures; why it did not take them, or None."""
        if not self._patches:
            return "it takes none"
        body = {"state": self.state, **asdict(self._figures())}
        reply = await self._send("PATCH", f"{ENGINES}/{self.record.engine_id}", body)
        self._patches = reply.status_code != NO_SUCH_METHOD
        return None if reply.is_success else f"{reply.status_code} {reply.text[:200]}"

    async def _delete(self) -> None:
        await self._send("DELETE", f"{ENGINES}/{self.record.engine_id}")

    async def _send(self, method: str, path: str, body: object = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise _Unreachable(
                Diagnostic(
                    f"no gateway answers at {self._gateway}: {error or type(error).__name__}",
                    help="start one with `sagellm-ir gateway start`",
                )
            ) from None


def attach_server(
    gateway: str,
    url: str,
    *,
    kind: str,
    model: str | None = None,
    engine_id: str | None = None,
    api_key: str | None = None,
) -> EngineRecord:
    """Register a running server with an OpenAI API; the gateway checks its health from then on.

    Args:
        gateway: its base URL.
        url: the server's.
        kind: "vllm", "lmdeploy", ...
        model: default: the first that the server lists.
        engine_id: default: kind and port.
        api_key: for the gateway, as a bearer token.

    Raises:
        SageIRError: one of them does not answer, or the gateway refuses.
    """
    place = httpx.URL(checked_url(url))
    if place.port is None:
        raise SageIRError(Diagnostic(f"{url!r}: expected http://HOST:PORT"))
    try:
        if model is None:
            served = httpx.get(place.join("/v1/models"), timeout=TIMEOUT).raise_for_status().json()
            model = str(served["data"][0]["id"])
        record = EngineRecord(
            engine_id or f"{kind}-{place.port}",
            model,
            place.host,
            place.port,
            metadata={"engine": kind, "instance_type": "general"},
        )
        body = _registration(record, verified=False)
        reply = httpx.post(
            f"{checked_url(gateway).rstrip('/')}{ENGINES}/register",
            json=body,
            headers=_bearer(api_key),
            timeout=TIMEOUT,
        )
    except (httpx.HTTPError, LookupError, ValueError) as error:
        raise SageIRError(
            Diagnostic(f"cannot attach {url}: {error or type(error).__name__}")
        ) from None
    if reply.is_error:
        message = f"the gateway refused engine {record.engine_id!r}: {reply.text[:200]}"
        raise SageIRError(Diagnostic(message))
    return record


def _bearer(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _registration(record: EngineRecord, *, verified: bool) -> dict[str, Any]:
    """The body of a registration; an engine that is `verified` is READY at once."""
    seen = {"pre_verified_healthy": True} if verified else {}
    return {
        "engine_id": record.engine_id,
        "model_id": record.model,
        "host": record.host,
        "port": record.port,
        "engine_kind": record.kind,
        "metadata": {**record.metadata, **seen},
    }


class _Unreachable(SageIRError):
    """No gateway is there, or not yet."""
