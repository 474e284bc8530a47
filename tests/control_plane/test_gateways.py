"""Fleets over HTTP: engines that attach to gateways, clients that ask them, engines that vanish."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.config import ServerConfig
from sagellm_ir.runtime.control_plane.attach import Attachment, EngineRecord, attach_server
from sagellm_ir.runtime.control_plane.client import UnifiedInferenceClient
from sagellm_ir.runtime.control_plane.fleet import Fleet
from sagellm_ir.runtime.control_plane.gateway import create_gateway
from sagellm_ir.runtime.control_plane.local import LocalMember
from sagellm_ir.runtime.control_plane.packages import have
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from tests.control_plane.cable import Cable
from tests.control_plane.tiny_fleet import MODEL, ask, chat, eventually, expected, tiny_engine
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


@BOTH
def test_an_engine_registers_reports_drains_and_leaves(gateway: Callable[[], Any]) -> None:
    async def test() -> None:
        async with gateway() as at, engine("a") as (made, port):
            record = EngineRecord("a", MODEL, "127.0.0.1", port)
            attachment = Attachment(
                at.url, record, figures=LocalMember(made).figures, interval=0.05
            )
            await attachment.open()
            assert await at.engines() == {"a": "READY"}
            found = (await at.http.get("/v1/models")).json()["data"]
            assert [model["id"] for model in found] == [MODEL]
            right = LocalMember(made).figures().kv_cache_capacity_bytes
            assert right > 0

            async def reported() -> bool:
                if isinstance(at.fleet, Fleet):
                    seen = at.fleet.find("a").figures
                else:
                    seen = at.fleet.get_engine("a")
                return bool(seen.kv_cache_capacity_bytes == right)

            await eventually(reported)
            await attachment.drain()
            assert await at.engines() == {"a": "DRAINING"}
            reply = await at.http.post(
                "/v1/chat/completions",
                json={"model": MODEL, "messages": [{"role": "user", "content": "x"}]},
            )
            assert reply.is_error
            await attachment.close()
            assert await at.engines() == {}

    run(test)


@BOTH
def test_a_gateway_that_forgot_an_engine_learns_it_again(gateway: Callable[[], Any]) -> None:
    async def test() -> None:
        async with gateway() as at, engine("a") as (_, port), attached(at, "a", port):
            await at.http.delete("/v1/management/engines/a")
            await at.come_to(a="READY")

    run(test)


@BOTH
def test_the_id_of_another_engine_is_refused(gateway: Callable[[], Any]) -> None:
    async def test() -> None:
        async with gateway() as at, engine("a") as (_, port):
            record = EngineRecord("a", MODEL, "127.0.0.1", port)
            crashed = Attachment(at.url, record, interval=3600)
            await crashed.open()
            other = Attachment(at.url, EngineRecord("a", MODEL, "127.0.0.1", 9))
            with pytest.raises(SageIRError, match="already registered"):
                await other.open()
            # The same engine, back after a crash, takes its own place.
            again = Attachment(at.url, record)
            await again.open()
            await again.close()
            await crashed.close()

    run(test)


def test_a_gateway_may_come_later() -> None:
    async def test() -> None:
        async with own() as at:
            url = at.url
        attachment = Attachment(url, EngineRecord("a", MODEL, "127.0.0.1", 9), interval=0.05)
        with pytest.raises(SageIRError, match="no gateway answers"):
            await Attachment(url, attachment.record).open()
        await attachment.open(patient=True)
        fleet = Fleet()
        config = uvicorn.Config(
            create_gateway(fleet), port=int(url.rpartition(":")[2]), log_level="error"
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while "a" not in fleet.places:
            await asyncio.sleep(0.02)
        await attachment.close()
        assert not fleet.places
        server.should_exit = True
        await task
        await fleet.stop()

    run(test)


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
def test_the_unified_client(gateway: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def use() -> None:
        with UnifiedInferenceClient.create() as client:
            assert client.models() == [MODEL]
            assert [engine["engine_id"] for engine in client.engines()] == ["a"]
            messages = [{"role": "user", "content": QUESTION}]
            answer = client.chat(messages, max_tokens=NEW, temperature=0)
            assert answer["choices"][0]["message"]["content"] == expected(chat("x", QUESTION))
            answer = client.generate(QUESTION, max_tokens=NEW, temperature=0)
            assert answer["choices"][0]["text"] == expected(ask("x", QUESTION))
            pieces = list(client.stream(QUESTION, max_tokens=NEW, temperature=0))
            assert len(pieces) > 1
            assert "".join(pieces) == expected(chat("x", QUESTION))
            with pytest.raises(SageIRError, match=r"answered [45]"):
                client.chat(messages, model="no-such-model")

    async def test() -> None:
        async with gateway() as at, engine("a") as (_, port), attached(at, "a", port):
            monkeypatch.setenv("SAGELLM_GATEWAY_URL", at.url)
            await asyncio.to_thread(use)

    run(test)


def test_the_unified_client_in_process() -> None:
    async def test() -> None:
        from sagellm_ir.runtime.control_plane.in_process import register

        async with sage() as at:
            made = tiny_engine("a")
            made.start()
            registration = await register(at.fleet, made)
            client = UnifiedInferenceClient.create(control_plane=at.fleet)

            def use() -> None:
                assert client.models() == [MODEL]
                answer = client.generate(QUESTION, max_tokens=NEW, temperature=0)
                assert answer["choices"][0]["text"] == expected(ask("x", QUESTION))
                assert answer["usage"]["completion_tokens"] == NEW
                pieces = client.stream(QUESTION, max_tokens=NEW, temperature=0)
                assert "".join(pieces) == expected(chat("x", QUESTION))
                with pytest.raises(SageIRError, match="no-such-model"):
                    client.generate("x", model="no-such-model")

            await asyncio.to_thread(use)
            # Over HTTP, the gateway package answers from the same engine: create_app(control_plane=...).
            body: dict[str, Any] = {"model": MODEL, "max_tokens": NEW, "temperature": 0}
            body["messages"] = [{"role": "user", "content": QUESTION}]
            reply = (await at.http.post("/v1/chat/completions", json=body)).json()
            assert reply["choices"][0]["message"]["content"] == expected(chat("x", QUESTION))
            assert made.load().finished == 3
            await registration.close()
            made.stop()

    run(test)


def test_no_gateway_is_an_error_that_helps() -> None:
    with (
        UnifiedInferenceClient.create("http://127.0.0.1:9") as client,
        pytest.raises(SageIRError, match="gateway start"),
    ):
        client.chat([{"role": "user", "content": "x"}])


@BOTH
def test_a_server_of_another_kind_is_attached_by_its_url(gateway: Callable[[], Any]) -> None:
    async def test() -> None:
        async with gateway() as at, engine("x") as (_, port):
            record = await asyncio.to_thread(
                lambda: attach_server(at.url, f"http://127.0.0.1:{port}", kind="vllm")
            )
            assert (record.engine_id, record.model) == (f"vllm-{port}", MODEL)
            while (await at.engines())[record.engine_id] != "READY":
                await asyncio.sleep(0.05)
            body = {"model": MODEL, "prompt": QUESTION, "max_tokens": NEW, "temperature": 0}
            reply = (await at.http.post("/v1/completions", json=body)).json()
            assert reply["choices"][0]["text"] == expected(ask("x", QUESTION))

    run(test)
