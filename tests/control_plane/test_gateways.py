"""Engines that attach to gateways over HTTP, report, leave, and come again."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.control_plane.attach import Attachment, EngineRecord, attach_server
from sagellm_ir.runtime.control_plane.fleet import Fleet
from sagellm_ir.runtime.control_plane.gateway import create_gateway
from sagellm_ir.runtime.control_plane.local import LocalMember
from tests.control_plane.gateways import (
    BOTH,
    NEW,
    QUESTION,
    attached,
    engine,
    own,
    run,
)
from tests.control_plane.tiny_fleet import MODEL, ask, eventually, expected


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
