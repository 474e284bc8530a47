"""A real server on a free port, in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from attrs import frozen

from sagellm_ir.runtime import SageLLMEngine
from sagellm_ir.runtime.config import LimitsConfig, ServerConfig
from sagellm_ir.runtime.server.app import create_app

__all__ = ["Served", "serving"]


@frozen
class Served:
    """A server that listens."""

    engine: SageLLMEngine
    url: str


@contextmanager
def serving(
    engine: SageLLMEngine, server: ServerConfig | None = None, limits: LimitsConfig | None = None
) -> Iterator[Served]:
    """Serve a started engine; its own stopping is left to who made it."""
    config = uvicorn.Config(create_app(engine, server, limits), log_level="warning", lifespan="off")
    config.port = 0
    listening = config.bind_socket()
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listening],), name="served")
    thread.start()
    try:
        while not running.started:
            time.sleep(0.005)
        yield Served(engine, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        running.should_exit = True
        thread.join()
        listening.close()
