"""Runs a gateway in this process: SAGE's with our routing, SAGE's as it is, or our own."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sagellm_ir.runtime.config import LimitsConfig, ServerConfig
from sagellm_ir.runtime.control_plane.fleet import Fleet
from sagellm_ir.runtime.control_plane.gateway import create_gateway
from sagellm_ir.runtime.control_plane.packages import have, require
from sagellm_ir.runtime.control_plane.routing import Router
from sagellm_ir.runtime.server.listening import listen

__all__ = ["choose", "run_own", "run_sage", "run_stock"]

GRACE = 30
"""Seconds for answers under way when the gateway is told to stop."""
PACKAGE, EXTRA = "sagellm_gateway", "gateway"
Started = Callable[[str], None]


def choose(kind: str) -> str:
    """Which gateway `auto` is here; the others as they are.

    Raises:
        SageIRError: it is SAGE's, and that is not installed.
    """
    if kind == "auto":
        return "sage" if have(PACKAGE) else "own"
    if kind != "own":
        require(PACKAGE, EXTRA)
    return kind


def run_stock(server: ServerConfig) -> None:
    """Become `sagellm-gateway`, with the flags that it accepts; does not return."""
    words = ["-m", PACKAGE, "--host", server.host, "--port", str(server.port)]
    os.execv(sys.executable, [sys.executable, *words])


def run_sage(server: ServerConfig, router: Router, policy: str, started: Started) -> None:
    """SAGE's gateway over a `FleetManager`, until a signal ends it.

    Raises:
        SageIRError: there is no such policy, or the address is taken.
    """
    from sagellm_ir.runtime.control_plane.manager import FleetManager
    from sagellm_ir.runtime.control_plane.sage_gateway import sage_gateway

    fleet = FleetManager(policy, router)

    @asynccontextmanager
    async def running() -> AsyncIterator[FastAPI]:
        await fleet.start()
        try:
            yield sage_gateway(fleet)
        finally:
            await fleet.stop()

    asyncio.run(_serve(running(), server, started))


def run_own(server: ServerConfig, router: Router, limits: LimitsConfig, started: Started) -> None:
    """Our own gateway, until a signal ends it.

    Raises:
        SageIRError: the address is taken.
    """
    fleet = Fleet(router)

    @asynccontextmanager
    async def running() -> AsyncIterator[FastAPI]:
        await fleet.start()
        try:
            yield create_gateway(fleet, server, limits)
        finally:
            await fleet.stop()

    asyncio.run(_serve(running(), server, started))


async def _serve(
    running: AbstractAsyncContextManager[FastAPI], server: ServerConfig, started: Started
) -> None:
    async with running as app:
        config = uvicorn.Config(
            app,
            host=server.host,
            port=server.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE,
        )
        listening = listen(config)
        serving = _Server(config)
        task = asyncio.create_task(serving.serve([listening]))
        while not serving.started and not task.done():
            await asyncio.sleep(0.01)
        started(f"http://{server.host}:{listening.getsockname()[1]}")
        await task


class _Server(uvicorn.Server):
    """A signal ends it well: uvicorn raises it again when it has shut down."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
