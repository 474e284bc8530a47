"""Requests through gateways: where they go, what is passed on, and that none is lost."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.config import ServerConfig
from sagellm_ir.runtime.control_plane.attach import Attachment, EngineRecord
from sagellm_ir.runtime.control_plane.client import UnifiedInferenceClient
from sagellm_ir.runtime.control_plane.fleet import Fleet
from sagellm_ir.runtime.control_plane.gateway import create_gateway
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine
from tests.control_plane.cable import Cable
from tests.control_plane.gateways import (
    BOTH,
    NEW,
    QUESTION,
    Gateway,
    attached,
    engine,
    own,
    run,
    serve,
)
from tests.control_plane.tiny_fleet import MODEL, ask, chat, eventually, expected


@BOTH
def test_an_engine_that_vanishes_mid_stream_loses_nothing(gateway: Callable[[], Any]) -> None:
    """The client sees one answer; another engine went on with it."""

    async def test() -> None:
        async with (
            gateway() as at,
            engine("a") as (_, a),
            engine("b") as (other, b),
            Cable(a) as cable,
            attached(at, "a", cable.port),
            AsyncExitStack() as later,
        ):
            question = QUESTION * 20  # after its first answer, engine a is the one that knows it
            body = {"model": MODEL, "messages": [{"role": "user", "content": question}]}
            assert (await at.http.post("/v1/chat/completions", json=body)).is_success
            await later.enter_async_context(attached(at, "b", b))
            cable.after = 9
            client = openai.AsyncOpenAI(base_url=f"{at.url}/v1", api_key="none", max_retries=0)
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": question}],
                max_tokens=NEW,
                temperature=0,
                stream=True,
            )
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            assert text == expected(chat("x", question))
            assert other.load().finished == 1
            assert 0 < other.load().generated_tokens < NEW
            await at.come_to(a="ERROR")
            await client.close()

    run(test)


@BOTH
def test_requests_of_one_document_meet(gateway: Callable[[], Any]) -> None:
    async def test() -> None:
        document = "a document that is long enough to fill some of a router's blocks. " * 3
        async with (
            gateway() as at,
            engine("a") as (one, a),
            engine("b") as (two, b),
            attached(at, "a", a),
            attached(at, "b", b),
        ):
            bodies = [
                {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": f"{start}{document}{turn}"}],
                    "max_tokens": 4,
                    "temperature": 0,
                }
                for turn in range(3)
                for start in ("", "#")
            ]
            for body in bodies:
                reply = await at.http.post("/v1/chat/completions", json=body)
                assert reply.is_success
            assert (one.load().finished, two.load().finished) == (3, 3)
            for load in (one.load(), two.load()):
                assert load.cached_tokens > 0.6 * load.prompt_tokens

    run(test)


@BOTH
def test_busy_engines_are_passed_over(gateway: Callable[[], Any]) -> None:
    async def test() -> None:
        async with (
            gateway() as at,
            engine("a") as (busy, a),
            engine("b") as (idle, b),
            attached(at, "a", a),
            attached(at, "b", b),
        ):
            await busy.drain()  # from now on it answers 503
            for number in range(3):
                body = {"model": MODEL, "prompt": f"{number}", "max_tokens": 4, "temperature": 0}
                reply = await at.http.post("/v1/completions", json=body)
                assert reply.json()["choices"][0]["text"] == expected(ask("x", f"{number}", 4))
            assert idle.load().finished == 3
            assert (await at.engines())["a"] == "READY"

    run(test)


def test_our_gateway_passes_all_of_a_request_on() -> None:
    async def test() -> None:
        async with own() as at, engine("a") as (_, port), attached(at, "a", port):
            client = openai.AsyncOpenAI(base_url=f"{at.url}/v1", api_key="none", max_retries=0)
            whole = expected(ask("x", QUESTION))
            answer = await client.completions.create(
                model=MODEL, prompt=[QUESTION, "other"], n=2, max_tokens=NEW, stop=[whole[5:8]]
            )
            texts = [choice.text for choice in answer.choices]
            assert texts[0] == texts[1] == whole[: whole.index(whole[5:8])]
            assert len(texts) == 4
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(QUESTION) + len("other")
            with pytest.raises(openai.NotFoundError, match="no model 'x'"):
                await client.completions.create(model="x", prompt="x")
            with pytest.raises(openai.BadRequestError, match="they may have"):
                await client.completions.create(model=MODEL, prompt="x" * 5000, max_tokens=NEW)
            with pytest.raises(openai.BadRequestError, match="gateway does not pass"):
                await client.completions.create(model=MODEL, prompt="x", logprobs=1)
            await client.close()
            wrong = await at.http.post(
                "/v1/completions",
                json={"model": MODEL, "prompt": "x"},
                headers={"X-Accelerator": "ascnd"},
            )
            assert (wrong.status_code, "did you mean 'ascend'?" in wrong.text) == (400, True)

    run(test)


def test_our_gateway_without_engines_says_so() -> None:
    async def test() -> None:
        async with own() as at:
            reply = await at.http.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "no_engine"
            assert (await at.http.get("/ready")).status_code == 503
            bodies: list[Any] = [
                {},
                {"engine_id": "a", "model_id": "m", "host": "h", "port": 0},
                [],
            ]
            for body in bodies:
                reply = await at.http.post("/v1/management/engines/register", json=body)
                assert reply.status_code == 400
            reply = await at.http.patch("/v1/management/engines/a", json={"state": "REDY"})
            assert (reply.status_code, "did you mean 'READY'?" in reply.text) == (400, True)
            assert (await at.http.delete("/v1/management/engines/a")).status_code == 404

    run(test)


def test_a_gateway_with_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        fleet = Fleet()
        app = create_gateway(fleet, ServerConfig(api_keys=("secret",)))
        async with serve(app, fleet) as at, engine("a") as (made, port):
            record = EngineRecord("a", MODEL, "127.0.0.1", port)
            with pytest.raises(SageIRError, match="401"):
                await Attachment(at.url, record).open()
            attachment = Attachment(at.url, record, api_key="secret")
            await attachment.open()
            refused = pytest.raises(SageIRError, match="401")
            with UnifiedInferenceClient.create(at.url) as client, refused:
                await asyncio.to_thread(client.generate, "x", MODEL)
            monkeypatch.setenv("SAGELLM_GATEWAY_KEY", "secret")
            with UnifiedInferenceClient.create(at.url) as client:
                await asyncio.to_thread(client.generate, "x", MODEL)
            assert made.load().finished == 1
            await attachment.close()
        await fleet.stop()

    run(test)


@BOTH
def test_preferred_accelerators_first(gateway: Callable[[], Any]) -> None:
    async def test() -> None:
        ascend = {"metadata": {"capability": {"device": "ascend"}}}  # a simulated device
        async with (
            gateway() as at,
            engine("a") as (_, a),
            engine("b") as (simulated, b),
            attached(at, "a", a),
            attached(at, "b", b, **ascend),
        ):
            at.fleet.router = type(at.fleet.router)(prefer=("ascend", "cambricon"))
            for number in range(3):
                body = {"model": MODEL, "prompt": f"{number}", "max_tokens": 2}
                assert (await at.http.post("/v1/completions", json=body)).is_success
            assert simulated.load().finished == 3

    run(test)


@BOTH
def test_a_client_that_left_is_no_work_for_an_engine(
    gateway: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever time it leaves; each answer would take three seconds."""
    step = EmbeddedEngine.step

    def slow(self: EmbeddedEngine, *args: Any) -> Any:
        time.sleep(0.01)
        return step(self, *args)

    monkeypatch.setattr(EmbeddedEngine, "step", slow)

    async def leave(at: Gateway, after: int) -> None:
        body = {
            "model": MODEL,
            "stream": True,
            "max_tokens": 300,
            "messages": [{"role": "user", "content": QUESTION}],
        }
        async with at.http.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for _ in reply.aiter_lines():
                if not (after := after - 1):
                    return

    async def test() -> None:
        async with gateway() as at, engine("a") as (made, port), attached(at, "a", port):
            for after in range(3, 9):
                await leave(at, after)

            async def idle() -> bool:
                return not made.load().running

            await eventually(idle)
            load = made.load()
            assert (load.finished, load.aborted) == (0, 6)

    run(test)
