"""`serve`: an engine behind uvicorn, until a signal drains it."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import FrameType

import uvicorn

from sagellm_ir.runtime.config import LimitsConfig, ServerConfig
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from sagellm_ir.runtime.server.app import create_app
from sagellm_ir.runtime.server.listening import listen

__all__ = ["Joining", "serve"]

logger = logging.getLogger(__name__)

Joining = Callable[[str, int], AbstractAsyncContextManager[object]]
"""Makes what surrounds serving, from the host and port that are listened on: entered when requests
can come, left when draining begins. A control plane registers and deregisters with it."""

_FLUSH_SECONDS = 5
"""For connections to take what is sent already, after the last request has ended."""


def serve(
    engine: SageLLMEngine,
    server: ServerConfig | None = None,
    limits: LimitsConfig | None = None,
    *,
    joining: Joining | None = None,
    started: Callable[[str, int], None] | None = None,
) -> None:
    """Start an engine and serve it; returns after SIGTERM or SIGINT, when it is drained.

    While draining, `/ready` and new requests get 503, and running requests finish, for up to
    `limits.drain_seconds`. A second signal does not wait.

    Args:
        engine: not started yet.
        server: the address, and who may ask.
        limits: how much they may ask for.
        joining: see `Joining`.
        started: called with host and port once requests can come.

    Raises:
        SageIRError: the address cannot be listened on.
    """
    asyncio.run(
        _serve(engine, server or ServerConfig(), limits or LimitsConfig(), joining, started)
    )


async def _serve(
    engine: SageLLMEngine,
    server: ServerConfig,
    limits: LimitsConfig,
    joining: Joining | None,
    started: Callable[[str, int], None] | None,
) -> None:
    app = create_app(engine, server, limits)
    config = uvicorn.Config(
        app,
        host=server.host,
        port=server.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        lifespan="off",
    )
    listening = listen(config)
    host, port = listening.getsockname()[:2]
    engine.start()
    try:
        draining = _Draining(config, engine, limits.drain_seconds)
        serving = asyncio.create_task(draining.serve([listening]))
        async with AsyncExitStack() as stack:
            while not draining.started and not serving.done():
                await asyncio.sleep(0.01)
            if joining is not None:
                await stack.enter_async_context(joining(host, port))
            if started is not None:
                started(host, port)
            await draining.told()
        await draining.drain()
        await asyncio.to_thread(engine.stop)  # what is unfinished hears so, while it can be told
        await serving
    finally:
        await asyncio.to_thread(engine.stop)


class _Draining(uvicorn.Server):
    """A server whose first signal only tells; `drain` ends it. The second one ends it at once."""

    def __init__(self, config: uvicorn.Config, engine: SageLLMEngine, seconds: float) -> None:
        super().__init__(config)
        self._engine, self._seconds = engine, seconds
        self._loop = asyncio.get_running_loop()
        self._told = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told.is_set():
            self.should_exit = self.force_exit = True
        self._loop.call_soon_threadsafe(self._told.set)

    async def told(self) -> None:
        """Wait for a signal."""
        await self._told.wait()

    async def drain(self) -> None:
        """Let requests finish, then end."""
        draining = asyncio.create_task(self._engine.drain(self._seconds))
        while not draining.done() and not self.should_exit:
            await asyncio.sleep(0.02)
        if not (draining.done() and draining.result()):
            logger.warning("stopped with %d requests unfinished", self._engine.load().running)
        draining.cancel()
        self.should_exit = True
