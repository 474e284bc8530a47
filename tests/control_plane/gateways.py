"""Gateways and engines that tests serve: our gateway, and the real package over the real Control Plane."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from sagellm_ir.runtime.control_plane.attach import Attachment, EngineRecord
from sagellm_ir.runtime.control_plane.fleet import Fleet
from sagellm_ir.runtime.control_plane.gateway import create_gateway
from sagellm_ir.runtime.control_plane.packages import have
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from tests.control_plane.tiny_fleet import MODEL, eventually, tiny_engine
from tests.server.serving import serving

NEW = 24
QUESTION = "Once upon a time"


class Gateway:
    """A gateway that serves, and the fleet behind it."""

    def __init__(self, url: str, fleet: Any) -> None:
        self.url, self.fleet = url, fleet
        self.http = httpx.AsyncClient(base_url=url, timeout=60)

    async def engines(self) -> dict[str, str]:
        """Their states."""
        found = (await self.http.get("/v1/management/engines")).json()["engines"]
        return {engine["engine_id"]: engine["state"] for engine in found}

    async def come_to(self, **states: str) -> None:
        """Wait until these engines are in these states."""

        async def are() -> bool:
            return states.items() <= (await self.engines()).items()

        await eventually(are)


@asynccontextmanager
async def serve(app: FastAPI, fleet: Any) -> AsyncIterator[Gateway]:
    config = uvicorn.Config(app, log_level="error")
    config.port = 0
    listening = config.bind_socket()
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    gateway = Gateway(f"http://127.0.0.1:{listening.getsockname()[1]}", fleet)
    try:
        yield gateway
    finally:
        await gateway.http.aclose()
        server.should_exit = True
        await task
        listening.close()


@asynccontextmanager
async def own() -> AsyncIterator[Gateway]:
    fleet = Fleet(interval=0.2, most_failures=1)
    await fleet.start()
    async with serve(create_gateway(fleet), fleet) as gateway:
        yield gateway
    await fleet.stop()


@asynccontextmanager
async def sage() -> AsyncIterator[Gateway]:
    """The real gateway package over the real Control Plane, with our routing and failover."""
    if not have("sagellm_gateway"):
        pytest.skip("isagellm-gateway is not installed: make build/control-plane/.ready")
    from sagellm_ir.runtime.control_plane.manager import FleetManager
    from sagellm_ir.runtime.control_plane.sage_gateway import sage_gateway

    fleet = FleetManager(health_check_interval_s=0.2, max_consecutive_failures=1)
    await fleet.start()
    async with serve(sage_gateway(fleet), fleet) as gateway:
        yield gateway
    await fleet.stop()


BOTH = pytest.mark.parametrize("gateway", [own, sage])


@asynccontextmanager
async def engine(engine_id: str) -> AsyncIterator[tuple[SageLLMEngine, int]]:
    """A served engine and its port."""
    made = tiny_engine(engine_id)
    made.start()
    try:
        with serving(made) as served:
            yield made, int(served.url.rpartition(":")[2])
    finally:
        made.stop()


@asynccontextmanager
async def attached(
    gateway: Gateway, engine_id: str, port: int, **options: Any
) -> AsyncIterator[Attachment]:
    record = EngineRecord(engine_id, MODEL, "127.0.0.1", port, **options)
    attachment = Attachment(gateway.url, record, interval=0.05)
    await attachment.open()
    try:
        yield attachment
    finally:
        await attachment.close()


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())
