"""LMDeploy under the online planner: what arrives while answers are decoded, and what is shared later."""

import asyncio
from typing import Any

import pytest

from sagellm_ir.runtime.engines.lmdeploy.online import OnlineSource, target_of
from sagellm_ir.runtime.engines.lmdeploy.scheduler import PlanDriver
from sagellm_ir.runtime.engines.lmdeploy.view import NamedSequences, Names
from sagellm_ir.runtime.planner import OnlinePlanner
from tests.lmdeploy.cpu import (
    BLOCK,
    add,
    ask,
    engine,
    next_turn,
    oracle,
    run,
    scheduler,
    stop,
)

SHARED = list(range(100, 100 + 8 * BLOCK))
LOOPS = 16


def drive(eng: Any) -> PlanDriver:
    requests = NamedSequences(eng.scheduler, Names())
    planner = OnlinePlanner(target_of(eng), window=64, outlast=True)
    return PlanDriver(eng, OnlineSource(planner, requests), requests)


def arrivals(planned: bool, count: int = 24, every: int = 6) -> list[dict[str, Any]]:
    """The decisions when one more request of 100 tokens to come arrives every so many decode forwards."""
    eng = engine(num_gpu_blocks=1024, max_batch_size=64)
    driver = drive(eng) if planned else None
    forwards = 0

    async def work() -> list[list[int]]:
        nonlocal forwards
        came, told = asyncio.Condition(), set[asyncio.Task[None]]()

        async def tell() -> None:
            async with came:
                came.notify_all()

        def count_up() -> None:
            nonlocal forwards
            last = eng.executor.trace[-1]
            forwards += last["loops"] if last["decode"] else 0
            told.add(asyncio.ensure_future(tell()))

        async def client(number: int) -> list[int]:
            async with came:
                await came.wait_for(lambda: forwards >= number * every)
            shared = SHARED if number % 2 else []
            return await ask(eng, number + 1, [*shared, *[number + 3] * 40], 100)

        eng.executor.on_forward = count_up
        return await asyncio.gather(*map(client, range(count)))

    answers = run(work)
    for number, answer in enumerate(answers):
        shared = SHARED if number % 2 else []
        assert answer == oracle([*shared, *[number + 3] * 40], 100)
    assert driver is None or (driver.unplanned, driver.rejected) == (0, [])
    return list(eng.executor.trace)


def test_arrivals_are_gathered_while_a_decode_step_runs_as_stock_gathers_them() -> None:
    stock, planned = arrivals(planned=False), arrivals(planned=True)
    for trace in (stock, planned):
        decodes = [step["loops"] for step in trace if step["decode"]]
        # However often something arrives or ends, a decode decision covers its 16 forwards.
        assert set(decodes[:-2]) == {LOOPS}
    prefills = [sum(not step["decode"] for step in trace) for trace in (stock, planned)]
    # 24 requests, one every 6 forwards: in 16 forwards come two or three.
    assert max(prefills) <= 14
    rows = [
        sum(len(step["tokens"]) for step in trace if not step["decode"]) for trace in (planned,)
    ]
    assert rows == [24]  # Each prompt in one piece.


def test_decodes_run_between_prefills_of_a_steady_stream() -> None:
    """A lone arrival does not keep many rows from decoding two prefills in a row."""
    trace = arrivals(planned=True, count=40, every=2)
    kinds = "".join("d" if step["decode"] else "p" for step in trace)
    assert "ppp" not in kinds.lstrip("p")


def test_the_next_turn_finds_the_answer_of_the_turn_before() -> None:
    eng = engine()
    driver = drive(eng)
    first = [*SHARED, *[7] * 20]

    async def work() -> list[int]:
        answer = await ask(eng, 1, first, 3 * BLOCK)
        assert answer == oracle(first, 3 * BLOCK)
        return [*first, *answer, *[9] * 10]

    async def talk() -> None:
        second = await work()
        assert await ask(eng, 2, second, 4) == oracle(second, 4)

    run(talk)
    prefills = [step for step in eng.executor.trace if not step["decode"]]
    known = len(first) + 3 * BLOCK - 1  # The newest token has no KV.
    [history] = prefills[-1]["history"]
    assert history == known // BLOCK * BLOCK
    source = driver.source
    assert isinstance(source, OnlineSource)
    assert source.planner.plan is not None
    [chunk] = source.planner.plan.steps[0].prefill
    assert chunk.start == history  # The planner knew.


def test_prefills_are_decided_while_decodes_run_and_compiled_between_decisions() -> None:
    """Full seats, and more waiting: a decision takes a compiled step, and keeps no forward waiting."""
    eng = engine(num_gpu_blocks=1024, max_batch_size=8)
    source = drive(eng).source
    assert isinstance(source, OnlineSource)
    scheduler, planner = eng.scheduler, source.planner
    decide, schedule = scheduler.plan_source.decide_prefill, scheduler.schedule
    compiled, beside = [], []

    def decided() -> Any:
        before = planner.epochs
        prefill = decide()
        compiled.append(planner.epochs - before)
        return prefill

    def scheduled(is_prefill: bool, prealloc_size: int) -> Any:
        in_flight = scheduler.num_locked()
        output = schedule(is_prefill, prealloc_size)
        if is_prefill and output.running:
            beside.append(in_flight)
        return output

    scheduler.plan_source.decide_prefill, scheduler.schedule = decided, scheduled
    prompts = [[*SHARED, *[number + 3] * 40] for number in range(32)]

    async def work() -> list[list[int]]:
        asks = [ask(eng, n + 1, prompt, 30 + 5 * (n % 4)) for n, prompt in enumerate(prompts)]
        return await asyncio.gather(*asks)

    answers = run(work)
    assert answers == [oracle(prompt, 30 + 5 * (n % 4)) for n, prompt in enumerate(prompts)]
    assert planner.epochs > 4
    assert sum(compiled) == 1  # of those that came first, when nothing ran yet
    assert len(beside) > 4
    assert not beside[0]
    assert all(beside[1:])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_another_turn_is_seen_though_as_many_wait_as_before(number: int) -> None:
    sched = scheduler()
    requests = NamedSequences(sched, Names())
    news = requests.follow()
    seqs = [add(sched, session + 1, [7] * 5) for session in range(3)]
    requests.refresh()
    news.take()
    seq = seqs[number]
    old = requests.live[seq.seq_id].id
    stop(seq)
    next_turn(seq, [8] * 4)
    requests.refresh()
    come, gone = news.take()
    assert ([seen.seq for seen in come], [seen.id for seen in gone]) == ([seq], [old])
    assert requests.found == {requests.names.request(seq): seq for seq in seqs}
    requests.refresh()
    assert news.take() == ([], [])
