"""A mixed fleet behind the real `ControlPlaneManager`: two sageLLM engines of this process, and two
servers with an OpenAI API that are registered as vLLM and as LMDeploy.

Those two are real servers over HTTP, but what runs in them is our engine: this tests that kinds mix
and that answers move between them, not vLLM or LMDeploy themselves.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from attrs import frozen

from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from tests.control_plane.cable import Cable
from tests.control_plane.test_in_process import protocol_request
from tests.control_plane.tiny_fleet import MODEL, ask, eventually, expected, tiny_engine
from tests.server.serving import serving

pytestmark = pytest.mark.usefixtures("real_control_plane")

HERE, THERE = ("sagellm-0", "sagellm-1"), ("vllm", "lmdeploy")
DOCUMENTS = [f"{n}: a document that fills some blocks of a router's index. " * 3 for n in range(4)]
PROMPTS = [f"{document} And {turn}?" for turn in range(3) for document in DOCUMENTS]


@frozen
class Mixed:
    """The fleet, its engines by id, and the cables to those over HTTP."""

    manager: Any
    engines: dict[str, SageLLMEngine]
    cables: dict[str, Cable]


@asynccontextmanager
async def mixed_fleet(policy: str = "fifo") -> AsyncIterator[Mixed]:
    from sagellm_ir.runtime.control_plane.in_process import register
    from sagellm_ir.runtime.control_plane.manager import FleetManager

    async with AsyncExitStack() as stack:
        manager = FleetManager(policy, health_check_interval_s=0.1, max_consecutive_failures=1)
        await manager.start()
        stack.push_async_callback(manager.stop)
        mixed = Mixed(manager, {}, {})
        for name in (*HERE, *THERE):
            engine = mixed.engines[name] = tiny_engine(name)
            engine.start()
            stack.callback(engine.stop)
            if name in HERE:
                stack.push_async_callback((await register(manager, engine)).close)
                continue
            served = stack.enter_context(serving(engine))
            cable = await stack.enter_async_context(Cable(int(served.url.rpartition(":")[2])))
            mixed.cables[name] = cable
            manager.register_engine(
                name, MODEL, "127.0.0.1", cable.port, name, metadata={"engine": name}
            )
        while any(info.state.value != "READY" for info in manager.list_engines()):
            await asyncio.sleep(0.02)
        yield mixed


async def streamed(manager: Any, name: str, prompt: str, **fields: Any) -> tuple[str, str]:
    """The text that a client of a stream gets, and how it ended."""
    text, finish = "", ""
    async for event in manager.stream_request(
        protocol_request(name, prompt=prompt, stream=True, **fields)
    ):
        text += event.content if event.event == "delta" else ""
        finish = event.finish_reason if event.event == "end" else finish
    return text, finish


@pytest.mark.parametrize("policy", ["fifo", "priority", "slo_aware"])
def test_every_kind_answers_and_documents_stay_together(policy: str) -> None:
    """Grouping by prefix is the router's, under every scheduling policy."""

    async def run() -> None:
        async with mixed_fleet(policy) as mixed:
            for first in range(0, len(PROMPTS), len(DOCUMENTS)):
                turn = range(first, first + len(DOCUMENTS))
                fields = {"metadata": {"priority": first % 5, "deadline_ms": 800.0}}
                answers = await asyncio.gather(
                    *(streamed(mixed.manager, f"r{n}", PROMPTS[n], **fields) for n in turn)
                )
                whole = [(expected(ask("x", PROMPTS[n])), "length") for n in turn]
                assert answers == whole
            loads = {name: engine.load() for name, engine in mixed.engines.items()}
            assert {name: load.finished for name, load in loads.items()} == dict.fromkeys(loads, 3)
            for load in loads.values():
                assert load.cached_tokens > 0.5 * load.prompt_tokens
            assert all(info.active_requests == 0 for info in mixed.manager.list_engines())

    asyncio.run(run())


@pytest.mark.parametrize("lost", [("sagellm-0", "vllm"), ("vllm", "lmdeploy")])
def test_engines_die_mid_stream_and_no_request_is_lost(lost: tuple[str, ...]) -> None:
    async def run() -> None:
        async with mixed_fleet() as mixed:
            running = [
                asyncio.create_task(streamed(mixed.manager, f"r{n}", prompt))
                for n, prompt in enumerate(PROMPTS)
            ]
            for name in lost:
                while mixed.engines[name].load().generated_tokens < 9:
                    await asyncio.sleep(0.002)
                if name in mixed.cables:
                    mixed.cables[name].cut()
                else:
                    await asyncio.to_thread(mixed.engines[name].stop)
            for prompt, answer in zip(PROMPTS, await asyncio.gather(*running), strict=True):
                assert answer == (expected(ask("x", prompt)), "length")

            async def only_lost_ones_are_out() -> bool:
                states = {info.engine_id: info.state.value for info in mixed.manager.list_engines()}
                return states == {name: "ERROR" if name in lost else "READY" for name in states}

            await eventually(only_lost_ones_are_out)

    asyncio.run(run())
