"""`FleetManager`: the real Control Plane with our routing and failover, engines in process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.control_plane.routing import Router
from tests.control_plane.test_in_process import protocol_request
from tests.control_plane.tiny_fleet import ask, eventually, expected, tiny_engine

pytestmark = pytest.mark.usefixtures("real_control_plane")

POLICIES = ("fifo", "priority", "slo_aware", "adaptive", "lifetime_aware")
DOCUMENT = "a document that is long enough to fill a few of the blocks that a router looks at. " * 2


@asynccontextmanager
async def fleet(*names: str, **options: Any) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    from sagellm_ir.runtime.control_plane.in_process import register
    from sagellm_ir.runtime.control_plane.manager import FleetManager

    async with AsyncExitStack() as stack:
        manager = FleetManager(**options)
        await manager.start()
        stack.push_async_callback(manager.stop)
        engines = {}
        for name in names:
            engines[name] = tiny_engine(name)
            engines[name].start()
            stack.callback(engines[name].stop)
            stack.push_async_callback((await register(manager, engines[name])).close)
        yield manager, engines


async def stream(manager: Any, request: Any) -> tuple[str, Any]:
    text, last = "", None
    async for last in manager.stream_request(request):
        text += last.content if last.event == "delta" else ""
    return text, last


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_answer_all_requests(policy: str) -> None:
    async def run() -> None:
        async with fleet("a", "b", scheduling_policy=policy) as (manager, engines):
            prompts = [f"{DOCUMENT}{n}" for n in range(3)] + [f"#{DOCUMENT}{n}" for n in range(3)]
            asked = [
                protocol_request(
                    f"r{n}", prompt=p, metadata={"priority": n % 5, "deadline_ms": 500.0}
                )
                for n, p in enumerate(prompts)
            ]
            # The first request of each document computes it; the others come while it is held.
            answers = await asyncio.gather(*map(manager.execute_request, asked[:1] + asked[3:4]))
            others = await asyncio.gather(*map(manager.execute_request, asked[1:3] + asked[4:]))
            answers = [answers[0], *others[:2], answers[1], *others[2:]]
            assert [a.output_text for a in answers] == [expected(ask("x", p)) for p in prompts]
            # Requests of one document met on one engine, and its KV was computed once.
            for engine in engines.values():
                assert engine.load().finished == 3
                assert engine.load().cached_tokens >= 2 * (len(DOCUMENT) - 4)
            assert manager.get_metrics_snapshot()["engine_assignment_counts"].keys() == {"a", "b"}
            assert all(info.active_requests == 0 for info in manager.list_engines())

    asyncio.run(run())


def test_an_engine_that_dies_mid_stream_loses_nothing() -> None:
    async def run() -> None:
        async with fleet("a", "b", max_consecutive_failures=1, health_check_interval_s=0.05) as (
            manager,
            engines,
        ):
            prompts = [f"{n} {DOCUMENT}" for n in range(6)]
            asked = [
                protocol_request(f"r{n}", prompt=p, stream=True) for n, p in enumerate(prompts)
            ]
            running = [asyncio.create_task(stream(manager, request)) for request in asked]
            while engines["a"].load().generated_tokens < 20:
                await asyncio.sleep(0.002)
            await asyncio.to_thread(engines["a"].stop)
            for prompt, (text, end) in zip(prompts, await asyncio.gather(*running), strict=True):
                assert text == end.content == expected(ask("x", prompt))
                assert end.finish_reason == "length"
                assert len(end.output_tokens) == 24

            async def lost() -> bool:
                return bool(manager.get_engine("a").state.value == "ERROR")

            await eventually(lost)
            assert manager.get_engine("b").state.value == "READY"
            assert all(info.active_requests == 0 for info in manager.list_engines())

    asyncio.run(run())


def test_with_no_engine_left_the_answer_is_an_error() -> None:
    async def run() -> None:
        async with fleet("a") as (manager, engines):
            await asyncio.to_thread(engines["a"].stop)
            for _ in range(2):
                answer = await manager.execute_request(protocol_request("r", prompt="x"))
                assert answer.finish_reason == "error"
                assert answer.error.retryable
            _, end = await stream(manager, protocol_request("s", prompt="x", stream=True))
            assert end.finish_reason == "error"
            assert "no" in end.error.message.lower()

    asyncio.run(run())


def test_a_draining_engine_gets_nothing_new() -> None:
    """The Control Plane's own health check takes a healthy engine's DRAINING back to READY."""

    async def run() -> None:
        async with fleet("a", "b", health_check_interval_s=0.02) as (manager, engines):
            manager.draining.add("a")
            for number in range(4):
                await manager.execute_request(protocol_request(f"r{number}", prompt="x"))
            assert engines["a"].load().finished == 0
            assert engines["b"].load().finished == 4

    asyncio.run(run())


def test_an_engine_in_error_that_answers_again_is_ready_again() -> None:
    async def run() -> None:
        from sagellm_control import EngineState

        async with fleet("a", health_check_interval_s=0.02) as (manager, _):
            manager.update_engine_state("a", EngineState.ERROR)

            async def back() -> bool:
                return bool(manager.get_engine("a").state is EngineState.READY)

            await eventually(back)

    asyncio.run(run())


def test_preferred_accelerators_by_request_metadata() -> None:
    async def run() -> None:
        async with fleet("a", "b") as (manager, engines):
            # A simulated device: the engine says it is one.
            manager.get_engine("b").metadata["capability"]["device"] = "ascend"
            for number in range(3):
                asked = protocol_request(
                    f"r{number}", prompt=f"{number}", metadata={"accelerator": "domestic"}
                )
                await manager.execute_request(asked)
            assert engines["b"].load().finished == 3

    asyncio.run(run())


def test_public_scheduling_goes_through_the_router() -> None:
    async def run() -> None:
        async with fleet("a", "b", router=Router()) as (manager, _):
            first = await manager.schedule_request("r1", "t", "tiny", prompt=DOCUMENT)
            again = await manager.schedule_request("r2", "t", "tiny", prompt=DOCUMENT + "more")
            assert again.engine_id == first.engine_id
            assert "holds" in again.reason

    asyncio.run(run())


def test_unknown_policies_are_refused() -> None:
    """`ControlPlaneManager` takes them for fifo without a word."""
    from sagellm_ir.runtime.control_plane.manager import FleetManager

    with pytest.raises(SageIRError, match="did you mean 'slo_aware'"):
        FleetManager("slo-aware")


def test_foreign_engines_are_refused() -> None:
    async def run() -> None:
        async with fleet() as (manager, _):
            with pytest.raises(SageIRError, match="register"):
                manager.register_engine("x", "m", llm_engine=object())

    asyncio.run(run())
