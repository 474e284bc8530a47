"""SAGE's packages as they are, without our manager: the stock Control Plane and gateway process."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request, Response

from sagellm_ir.runtime.control_plane.attach import Attachment, EngineRecord
from sagellm_ir.runtime.control_plane.packages import have
from tests.control_plane.gateways import Gateway, engine, serve
from tests.control_plane.test_in_process import control_plane, protocol_request
from tests.control_plane.tiny_fleet import MODEL, chat, expected

pytestmark = pytest.mark.usefixtures("real_control_plane")

QUESTION = "Once upon a time"
PATIENCE = 60.0


@pytest.fixture
def stock() -> Iterator[str]:
    """The URL of a `sagellm-gateway` process."""
    if not have("sagellm_gateway"):
        pytest.skip("isagellm-gateway is not installed: make build/control-plane/.ready")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("--host", "127.0.0.1", "--port", str(port))
    process = subprocess.Popen(
        [sys.executable, "-m", "sagellm_gateway", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    while True:
        try:
            httpx.get(f"{url}/health")
            break
        except httpx.HTTPError:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
    yield url
    process.terminate()
    process.wait()


def test_an_engine_at_the_stock_gateway(stock: str) -> None:
    async def run() -> None:
        async with engine("a") as (_, port):
            at = Gateway(stock, None)
            attachment = Attachment(
                stock, EngineRecord("a", MODEL, "127.0.0.1", port), interval=0.05
            )
            await attachment.open()
            assert await at.engines() == {"a": "READY"}
            client = openai.AsyncOpenAI(base_url=f"{stock}/v1", api_key="none", max_retries=0)
            asked: dict[str, Any] = {
                "model": MODEL,
                "messages": [{"role": "user", "content": QUESTION}],
                "max_tokens": 24,
                "temperature": 0,
            }
            whole = await client.chat.completions.create(**asked)
            assert whole.choices[0].message.content == expected(chat("x", QUESTION))
            # Its client fails on a chunk without choices; the engine sends none unless asked to.
            stream = await client.chat.completions.create(**asked, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == expected(chat("x", QUESTION))
            await client.close()
            await at.http.delete("/v1/management/engines/a")
            await at.come_to(a="READY")  # a heartbeat found it missing
            await attachment.drain()
            assert await at.engines() == {}  # it knows no DRAINING from outside
            await attachment.close()
            await at.http.aclose()

    asyncio.run(run())


@asynccontextmanager
async def losing_answers(port: int, count: int) -> AsyncIterator[tuple[Gateway, list[str]]]:
    """A front of an engine that answers 502 `count` times, after the engine has done its work."""
    app, posts = FastAPI(), list[str]()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.post("/v1/chat/completions", response_model=None)
    async def post(http: Request) -> Response:
        posts.append(http.headers["x-request-id"])
        names = ("x-request-id", "x-trace-id", "content-type")
        headers = {name: http.headers[name] for name in names if name in http.headers}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            reply = await client.post(
                http.url.path, content=await http.body(), headers=headers, timeout=PATIENCE
            )
        if len(posts) <= count:
            return Response("lost", 502)
        return Response(reply.content, reply.status_code, media_type="application/json")

    async with serve(app, None) as front:
        yield front, posts


def test_requests_that_are_posted_again_run_once() -> None:
    """The stock Control Plane posts up to four times, under one X-Request-ID."""

    async def run() -> None:
        async with (
            control_plane() as manager,
            engine("a") as (made, port),
            losing_answers(port, 2) as (front, posts),
        ):
            manager.register_engine(
                "a",
                MODEL,
                "127.0.0.1",
                int(front.url.rpartition(":")[2]),
                metadata={"pre_verified_healthy": True},
            )
            asked = protocol_request(
                "once", messages=[{"role": "user", "content": QUESTION}], temperature=0.0
            )
            answer = await manager.execute_request(asked)
            assert answer.output_text == expected(chat("x", QUESTION))
            assert posts == ["once"] * 3
            assert made.load().finished == 1

    asyncio.run(run())


def test_over_http_an_engine_becomes_ready_by_its_health() -> None:
    async def run() -> None:
        async with (
            control_plane(health_check_interval_s=0.05, max_consecutive_failures=1) as manager,
            engine("a") as (made, port),
        ):
            info = manager.register_engine("a", MODEL, "127.0.0.1", port, "sagellm")
            assert info.state.value == "STARTING"
            while info.state.value != "READY":
                await asyncio.sleep(0.02)
            made.stop()
            while info.state.value != "ERROR":
                await asyncio.sleep(0.02)

    asyncio.run(run())
