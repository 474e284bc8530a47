"""What runs right behind the step in flight: decodes whose last tokens the host has not seen, chunks of
prompts whose chunks are in flight, and requests that come while the first forward runs."""

import asyncio
import random
import types
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
from lmdeploy.messages import GenerationConfig

from sagellm_ir.lowering.plan import PlanStep, PrefillChunk
from sagellm_ir.runtime.engines.lmdeploy.admission import Admission
from sagellm_ir.runtime.engines.lmdeploy.checks import StepChecks
from sagellm_ir.runtime.engines.lmdeploy.flight import Flight
from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager
from sagellm_ir.runtime.engines.lmdeploy.online import OnlineSource, target_of
from sagellm_ir.runtime.engines.lmdeploy.scheduler import PlanDriver
from sagellm_ir.runtime.engines.lmdeploy.view import NamedSequences, Names
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.runtime.trace import Trace
from tests.lmdeploy.cpu import (
    BLOCK,
    add,
    ask,
    blocks_of,
    engine,
    next_token,
    oracle,
    run,
    scheduler,
)
from tests.lmdeploy.test_random import check

LOOPS = 16
STOP = 5


def planned(answer: Callable[[Any], int] = next_token, /, **config: Any) -> Any:
    """An engine under the online planner; its trace says also how many rows were in flight."""
    eng = engine(answer, **{"num_gpu_blocks": 1024, "max_batch_size": 64, **config})
    requests = NamedSequences(eng.scheduler, Names())
    planner = OnlinePlanner(target_of(eng), window=64, outlast=True)
    PlanDriver(eng, OnlineSource(planner, requests), requests)

    def forward() -> None:
        eng.executor.trace[-1]["locked"] = eng.scheduler.num_locked()
        check(eng.scheduler)

    eng.executor.on_forward = forward
    return eng


def asked(
    eng: Any,
    prompts: Sequence[Sequence[int]],
    new: Sequence[int],
    before: Sequence[int] = (),
) -> list[list[int]]:
    """All answers, asked for at once after one to `before`; no step was dropped, or left to LMDeploy's
    own rules."""

    async def work() -> list[list[int]]:
        if before:
            await ask(eng, 99, before, 3)
        both = enumerate(zip(prompts, new, strict=True))
        return await asyncio.gather(*(ask(eng, n + 1, prompt, k) for n, (prompt, k) in both))

    answers = run(work)
    source = eng.scheduler.plan_source
    assert (source.unplanned, source.rejected) == (0, [])
    return answers


def test_decodes_follow_one_another_while_rows_end() -> None:
    """Of each length of answers; some rows end in each step, so the rows of the next are others."""
    rng = random.Random(3)
    prompts = [[n % 3] * 2 * BLOCK + [n + 10] * rng.randrange(1, 40) for n in range(12)]
    new = [rng.randrange(2, 90) for _ in prompts]
    eng = planned()
    trace = eng.scheduler.plan_source.trace = Trace("lmdeploy", BLOCK)
    answers = asked(eng, prompts, new)
    assert answers == [oracle(prompt, k) for prompt, k in zip(prompts, new, strict=True)]
    for step in eng.executor.trace:  # what the attention is told of their lengths
        assert step["total"] == [
            a + b for a, b in zip(step["history"], step["tokens"], strict=True)
        ]
    reached: dict[str, int] = {}
    for row in chain.from_iterable(forward.rows for forward in trace.forwards):
        assert reached.get(row.request, row.start) == row.start
        reached[row.request] = row.stop
    assert sorted(reached.values()) == sorted(
        len(prompt) + k - 1 for prompt, k in zip(prompts, new, strict=True)
    )
    decodes = [step for step in eng.executor.trace if step["decode"]]
    assert len({len(step["tokens"]) for step in decodes}) > 3
    assert [step["follows"] for step in decodes] == [False] + [True] * (len(decodes) - 1)
    assert all(step["locked"] for step in decodes[1:])


@pytest.mark.parametrize("place", [1, 15, 16, 17, 31, 32, 33, 40])
def test_answers_end_at_stop_tokens_wherever_they_are_in_a_step(place: int) -> None:
    """`place` of the stop token in one answer: a prefill gives the first token, then steps of 16. The next
    turn finds right KV in the blocks of a row that ran on."""

    def answer(context: np.ndarray) -> int:
        one = context[0] == 77 and len(context) == 40 + place - 1
        return STOP if one else next_token(context)

    def said(prompt: list[int], new: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(new):
            tokens.append(answer(np.array(tokens)))
            if tokens[-1] == STOP:
                break
        return tokens[len(prompt) :]

    eng = planned(answer)
    prompts = [[77] * 40, [78] * 40, [79] * 20]

    async def turn(session: int, tokens: list[int], new: int) -> list[int]:
        found: list[int] = []
        config = GenerationConfig(max_new_tokens=new, stop_token_ids=[STOP])
        instance = eng.create_instance()
        async for out in instance.async_stream_infer(session, tokens, gen_config=config):
            found += [int(token) for token in out.token_ids]
        return found

    async def work() -> None:
        answers = await asyncio.gather(*(turn(n, p, 60) for n, p in enumerate(prompts)))
        assert answers == [said(prompt, 60) for prompt in prompts]
        assert len(answers[0]) == place
        second = await turn(0, [6] * 9, 30)
        assert second == said([*prompts[0], *answers[0], *[6] * 9], 30)

    run(work)
    assert any(step["follows"] for step in eng.executor.trace)


def test_a_row_that_is_broken_off_in_flight_is_not_missed() -> None:
    eng = planned()

    async def work() -> None:
        others = [asyncio.ensure_future(ask(eng, n, [n] * 30, 100)) for n in (2, 3)]
        one = asyncio.ensure_future(ask(eng, 1, [1] * 30, 100, end=False))
        while sum(step["follows"] for step in eng.executor.trace) < 2:
            await asyncio.sleep(0)
        one.cancel()
        await eng.create_instance().async_end(1)
        late = await ask(eng, 4, [4] * 70, 40)
        assert late == oracle([4] * 70, 40)
        assert await asyncio.gather(*others) == [oracle([n] * 30, 100) for n in (2, 3)]

    run(work)
    check(eng.scheduler)


def test_which_decodes_may_follow() -> None:
    sched = scheduler()
    kv = KVManager(sched)
    admission = Admission(kv)
    alone = types.SimpleNamespace(dist_config=types.SimpleNamespace(world_size=1))
    names = NamedSequences(sched, Names())
    flight = Flight(alone, admission, StepChecks(names))
    rows = [add(sched, number, [number] * 9) for number in range(3)]
    chunks = [PrefillChunk(f"session-{number}-9", 0, 9) for number in range(3)]
    assert admission.prefill(zip(rows, chunks, strict=True)) == rows
    flight.took(rows, is_prefill=True)
    sched.lock_running(rows)
    step = PlanStep(0, decode=("a", "b"), loops=4)
    assert not flight.leads_to(step, rows)  # behind a prefill
    flight.took(rows[:2], is_prefill=False)
    assert flight.leads_to(step, rows[1::-1])
    assert flight.places(rows[1::-1]).tolist() == [1, 0]
    assert not flight.leads_to(step, rows)  # one of them is not in it
    assert not flight.leads_to(step, [rows[0], None])
    assert not flight.leads_to(PlanStep(0), [])
    rows[0].model_meta = {"said": "by the last forward"}
    assert not flight.leads_to(step, rows[:2])
    rows[0].model_meta, rows[1].sampling_param.min_new_tokens = None, rows[1].num_new_tokens + 1
    assert not flight.leads_to(step, rows[:2])
    assert flight.leads_to(step, rows[:1])
    alone.dist_config.world_size = 2
    several = Flight(alone, admission, StepChecks(names))
    several.took(rows[:2], is_prefill=False)
    assert not several.leads_to(step, rows[:1])


@pytest.mark.parametrize("config", [{"num_cpu_blocks": 64}, {"num_gpu_blocks": 12}])
def test_decodes_wait_where_blocks_may_have_to_be_moved_or_found(config: dict[str, int]) -> None:
    """With a host tier; and where the cache holds those that the next step needs."""
    eng = planned(**config)
    prompts = [[n + 10] * 30 for n in range(2)]
    answers = asked(eng, prompts, [50, 50], before=[3] * 9 * BLOCK)
    assert answers == [oracle(prompt, 50) for prompt in prompts]
    decodes = [step["follows"] for step in eng.executor.trace if len(step["tokens"]) == 2]
    assert not all(decodes[2:])


def test_a_chunk_is_given_while_the_chunk_before_it_is_in_flight() -> None:
    eng = planned(max_prefill_token_num=4 * BLOCK)
    long = list(range(10 * BLOCK + 5))
    prompts = [long, [*long, 9], [8] * 20]
    assert asked(eng, prompts, [20] * 3) == [oracle(prompt, 20) for prompt in prompts]
    chunks = [step for step in eng.executor.trace if not step["decode"]]
    assert [step["tokens"] for step in chunks[:2]] == [[4 * BLOCK]] * 2
    assert chunks[2]["history"][0] == 8 * BLOCK
    assert [step["locked"] for step in chunks[:3]] == [0, 1, 1]


@pytest.mark.parametrize("room", [True, False])
def test_a_chunk_that_cannot_be_given_is_as_it_was(room: bool) -> None:
    """While one of its chunks is in flight: for the step's tokens, or for want of blocks."""
    sched = scheduler(blocks=64 if room else 8, tokens=4 * BLOCK)
    kv = KVManager(sched)
    admission = Admission(kv)
    prompts = list(range(10 * BLOCK)), [7] * 3 * BLOCK
    one, two = (add(sched, n, prompt) for n, prompt in enumerate(prompts))
    assert admission.prefill([(one, PrefillChunk("one", 0, 4 * BLOCK))]) == [one]
    sched.lock_running([one])
    before = one.num_history_ids, one.num_token_ids, one.status, blocks_of(one)
    rows = [(two, PrefillChunk("two", 0, 3 * BLOCK)), (one, PrefillChunk("one", 64, 128))]
    assert admission.prefill(rows) == [two]
    assert (one.num_history_ids, one.num_token_ids, one.status, blocks_of(one)) == before
    assert (admission.partial, admission.ahead) == ({one.seq_id}, set())
    assert admission.refused == {one.seq_id}
    check(sched)


def test_only_a_chunk_may_name_a_prompt_whose_chunk_is_in_flight() -> None:
    sched = scheduler()
    admission, names = Admission(KVManager(sched)), NamedSequences(sched, Names())
    one = add(sched, 0, list(range(6 * BLOCK)))
    name = f"session-0-{6 * BLOCK}"
    admission.prefill([(one, PrefillChunk(name, 0, 2 * BLOCK))])
    sched.lock_running([one])
    names.refresh()
    checks, partial = StepChecks(names), admission.partial
    chunk = PlanStep(0, prefill=(PrefillChunk(name, 2 * BLOCK, 4 * BLOCK),))
    assert checks.problem(chunk, 0, partial) == ""
    assert "is LOCKED, not WAITING" in checks.problem(chunk, 0)
    decode = PlanStep(0, decode=(name,), loops=1)
    assert "is LOCKED, not RUNNING" in checks.problem(decode, 16, partial)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_prompt_is_broken_off_while_two_of_its_chunks_are_in_flight(after: int) -> None:
    """`after` so many chunks; another turn of its conversation finds what was computed."""
    eng = planned(max_prefill_token_num=4 * BLOCK)
    long = list(range(11 * BLOCK + 5))

    async def work() -> None:
        instance = eng.create_instance()
        asking = asyncio.ensure_future(ask(eng, 1, long, 20, end=False))
        while len(eng.executor.trace) <= after:
            await asyncio.sleep(0)
        await instance.async_cancel(1)
        with pytest.raises(RuntimeError, match="CANCEL"):
            await asking
        assert await ask(eng, 2, long, 20) == oracle(long, 20)
        assert await ask(eng, 1, [7, 7], 20) == oracle([*long, 7, 7], 20)

    run(work)
    check(eng.scheduler)


def test_the_first_forward_waits_for_as_many_requests_as_fill_it() -> None:
    """The others of a burst come beside it; all that share its prefix run in the second."""
    shared = list(range(8 * BLOCK))
    prompts = [[*shared, *[n + 500] * 4] for n in range(20)]
    eng = planned(max_prefill_token_num=8 * BLOCK)
    known: list[int] = []
    before = eng.executor.on_forward

    def forward() -> None:
        before()
        known.append(len(eng.scheduler.seq_manager._seq_map))

    eng.executor.on_forward = forward
    assert asked(eng, prompts, [6] * 20) == [oracle(prompt, 6) for prompt in prompts]
    first, second = eng.executor.trace[:2]
    assert (known[0], first["tokens"]) == (1, [8 * BLOCK])
    assert (known[1], second["tokens"]) == (20, [4] * 20)


def test_small_requests_of_a_burst_run_together() -> None:
    eng = planned(max_prefill_token_num=16 * BLOCK)
    prompts = [[n + 500] * BLOCK for n in range(10)]
    assert asked(eng, prompts, [3] * 10) == [oracle(prompt, 3) for prompt in prompts]
    assert eng.executor.trace[0]["tokens"] == [BLOCK] * 10
