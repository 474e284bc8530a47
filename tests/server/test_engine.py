"""`SageLLMEngine`: real forwards, many requests at once; what one does never harms another."""

import asyncio
import random
import threading
from contextlib import aclosing

import pytest
from attrs import evolve

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import PlanStep
from sagellm_ir.request import ChatPrompt, Message, Request, Sampling, TextPrompt, TokenPrompt
from sagellm_ir.runtime import SageLLMEngine
from sagellm_ir.runtime.backend import TokenEvent
from sagellm_ir.runtime.engines.answers import (
    EngineBusy,
    EngineDraining,
    EngineFailed,
    Response,
    StreamDelta,
    StreamEnd,
    StreamStart,
)
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine
from tests.embedded.tiny import oracle
from tests.server.conftest import Make
from tests.server.tiny import BLOCK, load_tiny, tiny_model

BLOCKS = 64


def ask(name: str, tokens: list[int], new: int = 6, **more: object) -> Request:
    prompt = TokenPrompt(tuple(tokens))
    return Request(name, prompt=prompt, max_new_tokens=new, **more)  # type: ignore[arg-type]


def numbers(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(256) for _ in range(count)]


async def settled(engine: SageLLMEngine) -> None:
    """Wait until the engine has seen the end of everything."""
    for _ in range(500):
        load = engine.load()
        if not (load.waiting or load.running or load.kv_used_blocks):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"requests are left: {engine.load()}")


async def whole_pool_fits(engine: SageLLMEngine, blocks: int = BLOCKS) -> None:
    """A request that needs every block is answered: none has leaked."""
    size = blocks * BLOCK
    response = await engine.execute(ask("all", numbers(random.Random(99), size - 8), 8))
    assert response.prompt_tokens == size - 8


def test_a_next_turn_finds_the_kv_of_the_answer_before_it(make: Make) -> None:
    rng = random.Random(6)

    async def main() -> None:
        engine, history = make(), numbers(rng, 18)
        for turn in range(4):
            response = await engine.execute(ask(f"turn{turn}", history, 13))
            assert list(response.tokens) == oracle(tiny_model(), history, 13)
            # All but the newest token of the turn before has KV; full blocks of it are kept.
            known = len(history) - 5 - 1 if turn else 0
            assert response.cached_tokens == known // BLOCK * BLOCK
            history += [*response.tokens, *numbers(rng, 5)]

    asyncio.run(main())


def test_concurrent_answers_are_those_of_plain_decoding_and_share(make: Make) -> None:
    rng = random.Random(5)
    document = numbers(rng, 24)
    prompts = [document + numbers(rng, rng.randint(1, 9)) for _ in range(12)]

    async def main() -> list[Response]:
        engine = make()
        return await asyncio.gather(
            *(engine.execute(ask(f"r{i}", prompt, 8)) for i, prompt in enumerate(prompts))
        )

    for response, prompt in zip(asyncio.run(main()), prompts, strict=True):
        expected = oracle(tiny_model(), prompt, 8)
        end = expected.index(256) + 1 if 256 in expected else 8
        assert list(response.tokens) == expected[:end]
        assert response.prompt_tokens == len(prompt)
    cached = [response.cached_tokens for response in asyncio.run(main())]
    assert sorted(cached)[1:] == [24] * 11


def test_a_stream_has_a_start_tokens_in_order_and_an_end(make: Make) -> None:
    async def main() -> None:
        engine = make()
        request = Request("r", prompt=TextPrompt("hello"), max_new_tokens=5)
        events = [event async for event in engine.stream(request)]
        assert events[0] == StreamStart("r", engine.engine_id, 5)
        deltas = [event for event in events if isinstance(event, StreamDelta)]
        assert [delta.index for delta in deltas] == list(range(len(deltas)))
        last = events[-1]
        assert isinstance(last, StreamEnd)
        assert "".join(delta.text for delta in deltas) == last.response.text
        assert tuple(delta.token for delta in deltas) == last.response.tokens
        figures = last.response.metrics
        assert 0 < figures.prefill_ms <= figures.ttft_ms
        assert figures.kv_used_tokens == 5 + len(deltas) - 1

    asyncio.run(main())


def test_an_abort_a_closed_stream_and_a_cancelled_task_free_their_blocks(make: Make) -> None:
    async def main() -> None:
        engine, rng = make(BLOCKS), random.Random(3)
        for turn in range(10):
            closed = ask(f"closed{turn}", numbers(rng, 30), 100)
            async with aclosing(engine.stream(closed)) as events:
                async for event in events:
                    if isinstance(event, StreamDelta):
                        break
            task = asyncio.create_task(engine.execute(ask("task", numbers(rng, 30), 100)))
            aborted = asyncio.create_task(engine.execute(ask("abort", numbers(rng, 30), 100)))
            await asyncio.sleep(0.01)
            task.cancel()
            assert engine.abort("abort")
            assert (await aborted).finish == "abort"
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not engine.abort("abort")
        await settled(engine)
        assert engine.load().aborted == 30
        await whole_pool_fits(engine)

    asyncio.run(main())


def test_a_bad_request_is_told_why_and_harms_nobody(make: Make) -> None:
    async def main() -> None:
        engine = make()
        prompt = numbers(random.Random(8), 9)
        good = asyncio.create_task(engine.execute(ask("good", prompt, 40)))
        bad = [
            (ask("long", [1] * 300), "needs KV of|longer than the whole KV pool"),
            (ask("odd", [1, 9999]), "vocabulary"),
            (ask("huge", [1, 1 << 40]), "vocabulary"),
            (ask("none", []), "no prompt tokens"),
            (ask("adapter", [1], adapter="lora"), "adapter"),
            (ask("hot", [1], sampling=Sampling(temperature=-1.0)), "temperature"),
            (ask("seed", [1], sampling=Sampling(seed=1 << 80)), "cannot be run"),
            (
                Request("role", prompt=ChatPrompt((Message("forbidden", "x"),))),
                "no such role",
            ),
        ]
        for request, why in bad:
            with pytest.raises(SageIRError, match=why):
                await engine.execute(request)
        assert list((await good).tokens) == oracle(tiny_model(), prompt, 40)
        assert await engine.health_check()

    asyncio.run(main())


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-3])
def test_a_temperature_near_zero_is_greedy(make: Make, temperature: float) -> None:
    async def main() -> None:
        prompt = numbers(random.Random(4), 9)
        sampling = Sampling(temperature=temperature, top_p=1e-300)
        response = await make().execute(ask("cold", prompt, 6, sampling=sampling))
        assert list(response.tokens) == oracle(tiny_model(), prompt, 6)

    asyncio.run(main())


def test_evictions_are_counted_for_whom_they_hit(make: Make) -> None:
    rng = random.Random(8)

    async def main() -> None:
        engine = make()
        first = await engine.execute(ask("first", numbers(rng, 18)))
        await settled(engine)
        cached = engine.load().kv_held_blocks
        assert cached == (18 + 6 - 1) // BLOCK
        large = await engine.execute(ask("large", numbers(rng, BLOCKS * BLOCK - 8), 8))
        assert [r.metrics.evict_count for r in (first, large)] == [0, cached]
        assert engine.metrics().evict_count == cached

    asyncio.run(main())


def test_tenants_and_adapters_do_not_share(make: Make) -> None:
    async def main() -> None:
        engine, prompt = make(), numbers(random.Random(1), 20)
        cached = []
        for tenant in (None, "a", "b", "a", None):
            response = await engine.execute(ask("r", prompt, 2, tenant=tenant))
            cached.append(response.cached_tokens)
        assert cached == [0, 0, 0, 16, 16]
        both = [engine.execute(ask(f"{t}{i}", prompt, 2, tenant=t)) for t in "cd" for i in range(2)]
        found = sorted(response.cached_tokens for response in await asyncio.gather(*both))
        assert found[:2] == [0, 0]
        assert found[2] > 0

    asyncio.run(main())


def test_an_id_may_come_again_at_once_and_even_while_it_runs(make: Make) -> None:
    async def main() -> None:
        engine, prompt = make(), numbers(random.Random(2), 7)
        expected = oracle(tiny_model(), prompt, 6)
        for _ in range(5):
            same = await asyncio.gather(*(engine.execute(ask("same", prompt)) for _ in range(3)))
            assert all(list(response.tokens) == expected for response in same)
            assert {response.request_id for response in same} == {"same"}

    asyncio.run(main())


def test_too_many_waiting_requests_are_refused_with_a_time(make: Make) -> None:
    async def main() -> None:
        engine = make(blocks=16, max_waiting=4)
        # Each needs the whole pool: one runs, the others wait.
        tasks = [asyncio.create_task(engine.execute(ask(f"r{i}", [i] * 20, 44))) for i in range(12)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        busy = [result for result in results if isinstance(result, EngineBusy)]
        assert 7 <= len(busy) <= 8
        assert all(1 <= error.retry_after <= 30 for error in busy)
        assert all(isinstance(result, EngineBusy | Response) for result in results)

    asyncio.run(main())


def test_draining_finishes_what_runs_and_refuses_the_rest(make: Make) -> None:
    async def main() -> None:
        engine = make()
        running = asyncio.create_task(engine.execute(ask("r", [1, 2, 3], 50)))
        await asyncio.sleep(0)
        while not engine.load().steps:
            await asyncio.sleep(0.005)
        assert await engine.drain(seconds=30)
        assert len((await running).tokens) == 50
        with pytest.raises(EngineDraining):
            await engine.execute(ask("late", [1]))
        engine.stop()
        assert not await engine.health_check()

    asyncio.run(main())


class Breaking(EmbeddedEngine):
    """An engine whose device gives up after a few steps."""

    def step(self, step: PlanStep) -> list[TokenEvent]:
        if self.stats().steps >= 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().step(step)


def test_a_broken_engine_tells_everybody_and_is_not_healthy() -> None:
    loaded = load_tiny()
    engine = SageLLMEngine(evolve(loaded, backend=Breaking(tiny_model(), loaded.target)))
    engine.start()

    async def main() -> None:
        assert await engine.health_check()
        tasks = [engine.execute(ask(f"r{i}", [i] * 9, 40)) for i in range(5)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineFailed) for result in results)
        assert "illegal memory" not in str(results[0])
        for _ in range(200):
            if not await engine.health_check():
                break
            await asyncio.sleep(0.01)
        assert not await engine.health_check()
        with pytest.raises(EngineFailed):
            await engine.execute(ask("late", [1]))

    asyncio.run(main())
    engine.stop()


def test_after_random_traffic_nothing_is_left(make: Make) -> None:
    async def one(engine: SageLLMEngine, rng: random.Random, number: int) -> None:
        prompt = [rng.randrange(3)] * rng.randint(4, 40) + numbers(rng, rng.randint(1, 20))
        request = ask(f"r{number}", prompt, rng.randint(1, 30), tenant=rng.choice(["a", None]))
        patience = rng.randint(0, 40)
        async with aclosing(engine.stream(request)) as events:
            async for event in events:
                if isinstance(event, StreamDelta) and event.index == patience:
                    return

    async def main() -> None:
        engine, rng = make(BLOCKS), random.Random(11)
        for _ in range(6):
            await asyncio.gather(*(one(engine, rng, number) for number in range(25)))
        await settled(engine)
        load = engine.load()
        assert load.finished + load.aborted == 150
        assert not load.failed
        await whole_pool_fits(engine)

    before = set(threading.enumerate())
    asyncio.run(main())
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"engine-sagellm-0"}


def test_stopping_ends_the_thread_and_tells_who_waits(make: Make) -> None:
    async def main() -> None:
        engine = make()
        task = asyncio.create_task(engine.execute(ask("r", [1, 2], 200)))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineDraining):
            await task
        assert not any(thread.name == "engine-sagellm-0" for thread in threading.enumerate())

    asyncio.run(main())
