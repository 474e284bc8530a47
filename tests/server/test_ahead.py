"""The loop plans while steps are in flight: everybody gets their tokens, and no block is used too early."""

import asyncio
import random

import pytest
from attrs import define, evolve, field
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime import SageLLMEngine
from sagellm_ir.runtime.backend import TokenEvent
from sagellm_ir.runtime.engines.answers import EngineDraining, EngineFailed
from sagellm_ir.runtime.engines.loop import EngineLoop
from sagellm_ir.runtime.engines.metrics import Meter
from sagellm_ir.runtime.engines.tickets import Ended, Ticket
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.target import DEVICE
from tests.embedded.tiny import oracle
from tests.server.late import LateEngine
from tests.server.test_engine import ask, numbers, settled, whole_pool_fits
from tests.server.tiny import load_tiny, tiny_model

EOS = 256


def plain(prompt: list[int], new: int) -> list[int]:
    """What the model answers."""
    whole = oracle(tiny_model(), prompt, new)
    return whole[: whole.index(EOS) + 1] if EOS in whole else whole


@define
class Traffic:
    """A loop without its thread, turned by hand, and who asks it."""

    loop: EngineLoop
    backend: LateEngine
    tickets: dict[str, Ticket] = field(factory=dict)

    @classmethod
    def over(cls, depth: int, blocks: int, reserve: int | None) -> "Traffic":
        target = evolve(load_tiny(blocks).target, max_batch=4, max_tokens=32, max_loops=1)
        backend = LateEngine(target, depth)
        planner = OnlinePlanner(target, reserve=reserve, spill=True)
        return cls(EngineLoop("late", backend, planner, Meter(target), 256), backend)

    def ask(self, name: str, prompt: list[int], new: int) -> None:
        request = PlanRequest(
            name, max_new_tokens=new, prompt_len=len(prompt), tokens=tuple(prompt)
        )
        self.tickets[name] = self.loop.submit(request)

    def turn(self) -> bool:
        """What the thread does; whether there was anything to do."""
        return self.loop._take(wait=False) and self.loop._tick()

    def heard(self, name: str) -> tuple[list[int], bool]:
        """The tokens of a request, and whether it was told of its end."""
        news = self.tickets[name].news
        found = [news.get_nowait() for _ in range(news.qsize())]
        tokens = [item.token for item in found if isinstance(item, TokenEvent)]
        assert all(isinstance(item, TokenEvent) for item in found[:-1])
        return [token for token in tokens if token is not None], isinstance(found[-1], Ended)


@given(
    seed=st.integers(0, 2**20),
    depth=st.integers(1, 3),
    blocks=st.integers(16, 40),
    pace=st.integers(1, 6),
    reserve=st.sampled_from([None, 3]),
)
@settings(max_examples=40, deadline=None)
def test_any_traffic(seed: int, depth: int, blocks: int, pace: int, reserve: int | None) -> None:
    rng = random.Random(seed)
    documents = [numbers(rng, rng.randint(8, 24)) for _ in range(2)]
    asked = {
        f"r{at}": (rng.choice(documents) + numbers(rng, rng.randint(1, 9)), rng.randint(1, 20))
        for at in range(10)
    }
    patience = {name: rng.randint(0, 12) for name in asked if rng.random() < 0.3}

    async def main() -> Traffic:
        traffic = Traffic.over(depth, blocks, reserve)
        waiting = list(asked.items())
        for now in range(5000):
            if waiting and now % pace == 0:
                name, (prompt, new) = waiting.pop()
                traffic.ask(name, prompt, new)
            for name, ticket in traffic.tickets.items():
                if len(ticket.made) == patience.get(name):
                    traffic.loop.abandon(ticket)
            if not traffic.turn() and not waiting:
                break
        await asyncio.sleep(0)
        return traffic

    traffic = asyncio.run(main())
    for name, (prompt, new) in asked.items():
        whole = plain(prompt, new)
        got, ended = traffic.heard(name)
        assert ended
        assert got == whole[: patience.get(name)]
    assert traffic.loop.unfinished == 0
    view = traffic.backend.view()
    assert view.waiting == view.running == view.finished == ()
    assert traffic.loop._planner._ledger[DEVICE].room == blocks
    assert depth == 1 or traffic.backend.overlaps


def served(depth: int = 2, blocks: int = 64) -> SageLLMEngine:
    loaded = load_tiny(blocks)
    engine = SageLLMEngine(evolve(loaded, backend=LateEngine(loaded.target, depth)))
    engine.start()
    return engine


def test_what_waits_for_nothing_else_ends() -> None:
    """The last token is in flight, and there is no step to plan: it is waited for."""

    async def main() -> None:
        engine = served()
        for new in (1, 2, 3):
            response = await engine.execute(ask("r", [1, 2, 3], new))
            assert list(response.tokens) == plain([1, 2, 3], new)
        await settled(engine)
        await whole_pool_fits(engine)
        assert await engine.drain(seconds=30)
        engine.stop()

    asyncio.run(main())


def test_a_next_turn_finds_the_answer_before_it() -> None:
    rng = random.Random(6)

    async def main() -> None:
        engine, history = served(), numbers(rng, 18)
        for turn in range(4):
            response = await engine.execute(ask(f"turn{turn}", history, 13))
            assert list(response.tokens) == oracle(tiny_model(), history, 13)
            assert response.cached_tokens == ((len(history) - 6) // 4 * 4 if turn else 0)
            history += [*response.tokens, *numbers(rng, 5)]
        engine.stop()

    asyncio.run(main())


def test_stopping_leaves_no_step_in_flight() -> None:
    async def main() -> None:
        engine = served()
        backend = engine.loaded.backend
        assert isinstance(backend, LateEngine)
        task = asyncio.create_task(engine.execute(ask("r", [1, 2], 200)))
        while not backend.overlaps:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineDraining):
            await task
        assert not backend._steps

    asyncio.run(main())


class BreakingLater(LateEngine):
    """Its device gives up while steps are in flight."""

    def take(self) -> list[TokenEvent]:
        if self.stats().steps >= 4:
            raise RuntimeError("an illegal memory access")
        return super().take()


def test_an_engine_that_breaks_with_a_step_in_flight() -> None:
    async def main() -> None:
        loaded = load_tiny()
        engine = SageLLMEngine(evolve(loaded, backend=BreakingLater(loaded.target, 2)))
        engine.start()
        tasks = [engine.execute(ask(f"r{i}", [i] * 9, 40)) for i in range(5)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineFailed) for result in results)
        engine.stop()

    asyncio.run(main())


def test_a_step_has_one_forward_where_the_next_one_is_planned_meanwhile() -> None:
    """Else a token would wait for those behind it."""
    loops: dict[int, int] = {}

    class Noting(LateEngine):
        def begin(self, step: PlanStep) -> None:
            loops[self.depth] = max(loops.get(self.depth, 0), step.loops)
            super().begin(step)

    async def main() -> None:
        loaded = load_tiny()
        for depth in (1, 2):
            backend = Noting(loaded.target, depth)
            engine = SageLLMEngine(evolve(loaded, backend=backend), max_loops=4)
            engine.start()
            await engine.execute(Request("r", prompt=TokenPrompt((1, 2)), max_new_tokens=9))
            engine.stop()

    asyncio.run(main())
    assert loops == {1: 4, 2: 1}
