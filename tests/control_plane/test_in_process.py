"""Engines in the real `ControlPlaneManager`, in process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.control_plane.tiny_fleet import MODEL, ask, chat, eventually, expected, tiny_engine

pytestmark = pytest.mark.usefixtures("real_control_plane")


def protocol_request(name: str, **fields: Any) -> Any:
    from sagellm_protocol import Request

    return Request(request_id=name, trace_id="t", model=MODEL, max_tokens=24, **fields)


@asynccontextmanager
async def control_plane(**options: Any) -> AsyncIterator[Any]:
    from sagellm_control import ControlPlaneManager

    manager = ControlPlaneManager(**options)
    await manager.start()  # before any engine is registered
    try:
        yield manager
    finally:
        await manager.stop()


@asynccontextmanager
async def registered(manager: Any, name: str, **options: Any) -> AsyncIterator[Any]:
    from sagellm_ir.runtime.control_plane.in_process import register

    engine = tiny_engine(name)
    engine.start()
    registration = await register(manager, engine, **options)
    try:
        yield registration.info
    finally:
        await registration.close()
        engine.stop()


def test_request_and_metrics_survive() -> None:
    async def run() -> None:
        async with control_plane() as manager, registered(manager, "a") as info:
            assert info.state.value == "READY"
            prompt = "tell me what a control plane is, and what it is for"
            for name, hit in (("first", 0.0), ("again", 0.9)):
                answer = await manager.execute_request(protocol_request(name, prompt=prompt))
                assert answer.error is None
                assert answer.output_text == expected(ask("x", prompt))
                assert len(answer.output_tokens) == 24
                assert answer.finish_reason == "length"
                assert answer.prompt_tokens == len(prompt)
                assert answer.metrics.prefix_hit_rate >= hit
                assert answer.metrics.ttft_ms > 0
                assert answer.metrics.kv_used_bytes > 0

    asyncio.run(run())


def test_streams_chat() -> None:
    async def run() -> None:
        async with control_plane() as manager, registered(manager, "a"):
            asked = protocol_request("s", messages=[{"role": "user", "content": "hi"}], stream=True)
            events = [event async for event in manager.stream_request(asked)]
            kinds = [event.event for event in events]
            assert kinds == ["start", *["delta"] * 24, "end"]
            text = "".join(event.content for event in events if event.event == "delta")
            assert text == events[-1].content == expected(chat("x", "hi"))

    asyncio.run(run())


def test_stop_strings_arrive() -> None:
    async def run() -> None:
        from sagellm_protocol import SamplingParams

        async with control_plane() as manager, registered(manager, "a"):
            whole = expected(ask("x", "abc"))
            stop = whole[7:9]
            params = SamplingParams(stop_sequences=[stop], temperature=0.0)
            asked = protocol_request("s", prompt="abc", sampling_params=params)
            answer = await manager.execute_request(asked)
            assert answer.output_text == whole[: whole.index(stop)]
            assert answer.finish_reason == "stop"

    asyncio.run(run())


def test_figures_are_on_the_live_record() -> None:
    """They are what the Control Plane's own kv_cache_aware routing reads."""

    async def run() -> None:
        async with control_plane() as manager, registered(manager, "a") as info:
            assert info.kv_cache_capacity_bytes == 512 * 4 * 2 * 2 * 2 * 16 * 4
            asked = protocol_request("s", prompt="x" * 40, stream=True)
            seen = 0
            async for _ in manager.stream_request(asked):
                seen = max(seen, manager.get_engine("a").kv_cache_usage_bytes)
            assert 0 < seen < info.kv_cache_capacity_bytes

    asyncio.run(run())


def test_health_checks_of_a_started_control_plane_keep_it_ready() -> None:
    """It asks all engines over HTTP, those of its own process too; a dead one is in ERROR."""

    async def run() -> None:
        from sagellm_ir.runtime.control_plane.in_process import register

        async with control_plane(
            health_check_interval_s=0.05, max_consecutive_failures=1
        ) as manager:
            engine = tiny_engine("a")
            engine.start()
            registration = await register(manager, engine)
            info = registration.info

            async def alive() -> bool:
                return info.state.value == "READY" and info.last_heartbeat is not None

            async def lost() -> bool:
                return bool(info.state.value == "ERROR")

            await eventually(alive)
            engine.stop()
            await eventually(lost)
            await registration.close()
            assert manager.get_engine("a") is None

    asyncio.run(run())


def test_metadata_tells_kind_type_capability_and_schema() -> None:
    async def run() -> None:
        schema = {"dtype": "fp8_e4m3"}
        async with (
            control_plane() as manager,
            registered(manager, "a", instance_type="decoding", kv_schema=schema) as info,
        ):
            assert info.metadata["engine"] == "sagellm"
            assert info.metadata["instance_type"] == "decoding"
            assert info.metadata["kv_schema"] == schema
            assert info.metadata["capability"]["device"] == "cpu"
            assert info.metadata["domestic_accelerator"] is False
            status = manager.get_status()
            assert "decoding" in str(status)

    asyncio.run(run())


def test_bad_metadata_is_an_error_response() -> None:
    async def run() -> None:
        async with control_plane() as manager, registered(manager, "a"):
            asked = protocol_request("s", prompt="x", metadata={"priority": "hihg"})
            answer = await manager.execute_request(asked)
            assert answer.finish_reason == "error"
            assert "did you mean 'high'?" in answer.error.message

    asyncio.run(run())
