"""Our engine over vLLM's scheduler, with a worker that knows what every KV slot must hold."""

import asyncio
import random
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_ir.lowering.plan import Bind, KVMove, PlanRequest, PlanStep, PrefillChunk
from sagellm_ir.runtime.backend import TokenEvent
from sagellm_ir.runtime.engines.loop import EngineLoop
from sagellm_ir.runtime.engines.metrics import Meter
from sagellm_ir.runtime.engines.tickets import Ended, Ticket
from sagellm_ir.runtime.engines.vllm.engine import VLLMBackendAdapter
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.target import DEVICE
from tests.vllm import unit
from tests.vllm.test_scheduler import BLOCKS, tokens_of, workload
from tests.vllm.worker import answer

ASYNCHRONOUS = pytest.mark.parametrize("asynchronous", [False, True])


def adapter(
    asynchronous: bool, blocks: int = BLOCKS, tokens: Any = None, texts: Any = None
) -> VLLMBackendAdapter:
    core = unit.Core(unit.make(unit.target(blocks)), asynchronous)
    return VLLMBackendAdapter(unit.Engine(core, tokens or {}, texts or {}), stop_at_eos=False)


def planned(name: str, prompt: tuple[int, ...], new: int) -> PlanRequest:
    return PlanRequest(name, max_new_tokens=new, prompt_len=len(prompt), tokens=prompt)


async def serve(
    backend: VLLMBackendAdapter, seed: int, pace: int, patience: dict[str, int]
) -> dict[str, list[int]]:
    """Requests that come while others run, by a loop that is turned by hand; the answers.

    Those with patience leave when they have so many tokens.
    """
    target = evolve(backend.target, max_loops=1)
    planner = OnlinePlanner(target, reserve=seed % 3 + 1 if seed % 2 else None, spill=True)
    loop = EngineLoop("unit", backend, planner, Meter(target), 256)
    waiting, tickets = workload(seed, 12), dict[str, Ticket]()
    for now in range(5000):
        if waiting and now % pace == 0:
            request = waiting.pop(0)
            made = planned(request.id, tokens_of(request), request.max_new_tokens)
            tickets[request.id] = loop.submit(evolve(made, priority=request.priority))
        for name, ticket in tickets.items():
            if len(ticket.made) == patience.get(name):
                loop.abandon(ticket)
        if not (loop._take(wait=False) and loop._tick()) and not waiting:
            break
    await asyncio.sleep(0)
    assert loop.unfinished == 0
    assert planner._ledger[DEVICE].room == BLOCKS
    assert backend.scheduler.sequences == {}
    heard = {}
    for name, ticket in tickets.items():
        news = [ticket.news.get_nowait() for _ in range(ticket.news.qsize())]
        assert isinstance(news.pop(), Ended)
        assert all(isinstance(item, TokenEvent) for item in news)
        heard[name] = list(ticket.made)
    return heard


@ASYNCHRONOUS
@given(seed=st.integers(0, 2**20), pace=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_any_traffic(asynchronous: bool, seed: int, pace: int) -> None:
    """Every row reads right KV, and everybody gets their tokens: up to the planned one, to one that
    ends the answer, to a stop string, or to where they left."""
    rng = random.Random(seed)
    wholes = {r.id: answer(tokens_of(r), r.max_new_tokens) for r in workload(seed, 12)}
    tokens, texts, patience = dict[str, list[int]](), dict[str, int](), dict[str, int]()
    cuts = {name: len(whole) for name, whole in wholes.items()}
    for name, whole in wholes.items():
        at, way = rng.randrange(len(whole)), rng.randrange(6)
        if way == 0:
            tokens[name] = [whole[at]]
            cuts[name] = whole.index(whole[at]) + 1
        elif way == 1:
            texts[name] = cuts[name] = at + 1
        elif way == 2:
            patience[name] = cuts[name] = at
    backend = adapter(asynchronous, BLOCKS, tokens, texts)
    assert backend.depth == 1 + asynchronous
    answers = asyncio.run(serve(backend, seed, pace, patience))
    assert answers == {name: whole[: cuts[name]] for name, whole in wholes.items()}
    assert backend.scheduler.asked == backend.scheduler.answered


@ASYNCHRONOUS
def test_steps_in_flight_are_taken_in_order(asynchronous: bool) -> None:
    """With several forwards in a step, none, and one that waits for a token in flight."""
    backend, prompt = adapter(asynchronous), (1, 2, 3, 4, 5)
    moved = KVMove("device", "device", (0, 1, 2), (3, 4, 5))
    backend.submit(planned("a", prompt, 7))
    steps = [
        PlanStep(0, binds=(Bind("a", 0, (0, 1, 2)),), prefill=(PrefillChunk("a", 0, 5),)),
        PlanStep(1, decode=("a",), loops=3),
        PlanStep(2, kv=(KVMove("device", "host", (0,), (0,)),), loops=0),
        PlanStep(3, kv=(moved,), binds=(Bind("a", 0, (3, 4, 5)),), decode=("a",)),
        PlanStep(4, decode=("a",), loops=2),
    ]
    whole, made, flight = answer(prompt, 7), [], 0
    for step in steps:
        backend.begin(step)
        flight += 1
        if flight == backend.depth:
            made.append([event.token for event in backend.take()])
            flight -= 1
    assert flight == backend.depth - 1
    made += [[event.token for event in backend.take()] for _ in range(flight)]
    assert made == [whole[:1], whole[1:4], [], whole[4:5], whole[5:]]
    assert backend.stats().forwards == 7


@ASYNCHRONOUS
def test_an_answer_that_ended_is_not_told_of_what_was_in_flight(asynchronous: bool) -> None:
    """An abort, with a forward of it in flight; its name comes again at once."""
    backend, prompt = adapter(asynchronous), (1, 2, 3, 4, 5)
    backend.submit(planned("a", prompt, 7))
    bind, chunk = Bind("a", 0, (0, 1, 2)), PrefillChunk("a", 0, 5)
    backend.step(PlanStep(0, binds=(bind,), prefill=(chunk,)))
    backend.begin(PlanStep(1, decode=("a",)))
    backend.abort("a")
    assert backend.view().finished[0].pending == asynchronous
    backend.release("a")
    other = (5, 4, 3, 2, 1)
    backend.submit(planned("a", other, 7))
    events = backend.take() if backend.depth == 1 else []
    backend.begin(PlanStep(2, binds=(bind,), prefill=(chunk,)))
    while backend._flight:
        events += backend.take()
    assert [event.token for event in events if event.token is not None] == answer(other, 1)
