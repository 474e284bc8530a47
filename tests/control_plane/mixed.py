"""A mixed fleet behind the real `ControlPlaneManager`, and what must hold of it whatever runs in it.

Two sageLLM engines of this process, and engines of other kinds that it reaches over HTTP.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from attrs import frozen

from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from tests.control_plane.cable import Cable
from tests.control_plane.tiny_fleet import MODEL, ask, eventually, expected, tiny_engine
from tests.server.serving import serving

HERE, THERE = ("sagellm-0", "sagellm-1"), ("vllm", "lmdeploy")
DOCUMENTS = [f"{n}: a document that fills some blocks of a router's index. " * 3 for n in range(4)]
PROMPTS = [f"{document} And {turn}?" for turn in range(3) for document in DOCUMENTS]


@frozen
class Mixed:
    """The fleet, its engines of this process by id, and the cables to those over HTTP."""

    manager: Any
    engines: dict[str, SageLLMEngine]
    cables: dict[str, Cable]


@asynccontextmanager
async def mixed_fleet(
    policy: str = "fifo",
    make: Callable[[str], SageLLMEngine] = tiny_engine,
    elsewhere: Mapping[str, int] | None = None,
    model: str = MODEL,
) -> AsyncIterator[Mixed]:
    """A fleet whose engines are all READY.

    Args:
        policy: SAGE's order of requests.
        make: an engine of this process, by its id.
        elsewhere: ports of servers of other processes, by id; None: `THERE`, served by this one.
        model: what all of them serve.
    """
    from sagellm_ir.runtime.control_plane.in_process import register
    from sagellm_ir.runtime.control_plane.manager import FleetManager

    async with AsyncExitStack() as stack:
        manager = FleetManager(policy, health_check_interval_s=0.1, max_consecutive_failures=1)
        await manager.start()
        stack.push_async_callback(manager.stop)
        mixed = Mixed(manager, {}, {})
        ports = dict(elsewhere or {})
        for name in (*HERE, *(THERE if elsewhere is None else ())):
            engine = mixed.engines[name] = make(name)
            engine.start()
            stack.callback(engine.stop)
            if name in HERE:
                stack.push_async_callback((await register(manager, engine)).close)
            else:
                served = stack.enter_context(serving(engine))
                ports[name] = int(served.url.rpartition(":")[2])
        for name, port in ports.items():
            cable = mixed.cables[name] = await stack.enter_async_context(Cable(port))
            kind = {"engine": name}
            manager.register_engine(name, model, "127.0.0.1", cable.port, name, metadata=kind)
        while any(info.state.value != "READY" for info in manager.list_engines()):
            await asyncio.sleep(0.02)
        yield mixed


async def streamed(
    manager: Any, name: str, prompt: str, model: str = MODEL, new: int = 24, **fields: Any
) -> tuple[str, str]:
    """The text that a client of a greedy stream gets, and how it ended."""
    from sagellm_protocol import Request

    asked = Request(
        request_id=name,
        trace_id="t",
        model=model,
        prompt=prompt,
        max_tokens=new,
        temperature=0.0,
        stream=True,
        **fields,
    )
    text, finish = "", ""
    async for event in manager.stream_request(asked):
        text += event.content if event.event == "delta" else ""
        finish = event.finish_reason if event.event == "end" else finish
    return text, finish


async def documents_stay_together(mixed: Mixed) -> None:
    """Three turns about each document: all are right, and each engine gets those of one document."""
    for first in range(0, len(PROMPTS), len(DOCUMENTS)):
        turn = range(first, first + len(DOCUMENTS))
        wishes = {"priority": first % 5, "deadline_ms": 800.0}
        answers = await asyncio.gather(
            *(streamed(mixed.manager, f"r{n}", PROMPTS[n], metadata=wishes) for n in turn)
        )
        whole = [(expected(ask("x", PROMPTS[n])), "length") for n in turn]
        assert answers == whole
    loads = {name: engine.load() for name, engine in mixed.engines.items()}
    assert {name: load.finished for name, load in loads.items()} == dict.fromkeys(loads, 3)
    for load in loads.values():
        assert load.cached_tokens > 0.5 * load.prompt_tokens
    assert all(info.active_requests == 0 for info in mixed.manager.list_engines())


async def answers_outlive(mixed: Mixed, lost: tuple[str, ...]) -> None:
    """Engines are lost one after the other in the middle of answers; all answers are right."""
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
    await only_these_are_out(mixed, lost)


async def only_these_are_out(mixed: Mixed, lost: tuple[str, ...]) -> None:
    """The Control Plane comes to know who is lost, and takes nobody else for it."""

    async def known() -> bool:
        states = {info.engine_id: info.state.value for info in mixed.manager.list_engines()}
        return states == {name: "ERROR" if name in lost else "READY" for name in states}

    await eventually(known)
