"""Patch 0003 and the plan driver: a plan decides, and the answers stay right."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from lmdeploy.messages import GenerationConfig
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.pytorch.messages import MessageStatus
from lmdeploy.pytorch.model_inputs import ModelInputs, StepContext

from sagellm_ir.lowering.plan import Bind, KVFree, KVMove, PlanStep, PrefillChunk, PrefixGroup
from sagellm_ir.runtime.backend import EngineView
from sagellm_ir.runtime.engines.lmdeploy.scheduler import PlanDriver
from sagellm_ir.runtime.engines.lmdeploy.view import NamedSequences, Names, still
from tests.lmdeploy.cpu import BLOCK, ask, engine, oracle, run

SHARED = list(range(100, 100 + 8 * BLOCK))


class Steps:
    """A source that hands out steps, and keeps the views it was shown."""

    def __init__(self, steps: Iterable[PlanStep]) -> None:
        self.steps = list(steps)
        self.views: list[EngineView] = []

    def next_step(self, view: EngineView) -> PlanStep | None:
        self.views.append(still(view))
        return self.steps.pop(0) if self.steps else None


def chunk(request: str, start: int, stop: int) -> PrefillChunk:
    return PrefillChunk(request, start, stop)


def driven(
    steps: Sequence[PlanStep], prompts: Sequence[list[int]], new: int = 20, **options: Any
) -> tuple[PlanDriver, list[dict[str, Any]]]:
    """Run requests r0, r1, ... under a plan; every answer is checked."""
    overlap = options.pop("overlap", True)
    eng = engine(**options)
    names = Names()
    for i in range(len(prompts)):
        names.add(f"r{i}", i)
    driver = PlanDriver(eng, Steps(steps), NamedSequences(eng.scheduler, names), overlap=overlap)

    async def work() -> Any:
        return await asyncio.gather(
            *[ask(eng, i, p, new, end=False) for i, p in enumerate(prompts)]
        )

    assert run(work) == [oracle(prompt, new) for prompt in prompts]
    return driver, eng.executor.trace


def prompts(count: int) -> list[list[int]]:
    """Prompts of 148 tokens that share 128."""
    return [SHARED + [i] * 20 for i in range(count)]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_plan_decides_order_members_chunks_decodes_and_loops(overlap: bool) -> None:
    everyone = ("r0", "r1", "r2", "r3")
    steps = [
        PlanStep(0, prefill=(chunk("r2", 0, 48),)),
        PlanStep(1, prefill=(chunk("r2", 48, 148),)),
        PlanStep(2, decode=("r2",), loops=3),
        PlanStep(3, prefill=(chunk("r3", 128, 148), chunk("r0", 128, 148))),
        PlanStep(4, decode=("r0", "r2"), loops=2),
        PlanStep(5, prefill=(chunk("r1", 128, 148),)),
        PlanStep(6, decode=everyone, loops=5),
    ]
    driver, trace = driven(steps, prompts(4), overlap=overlap)
    assert driver.rejected == []
    seen = [(step["decode"], step["tokens"], step["history"], step["loops"]) for step in trace[:7]]
    assert seen == [
        (False, [48], [0], 1),
        (False, [100], [48], 1),
        (True, [1], [148], 3),
        (False, [20, 20], [128, 128], 1),
        (True, [1, 1], [148, 151], 2),
        (False, [20], [128], 1),
        (True, [1] * 4, [150, 148, 153, 148], 5),
    ]


def test_a_step_with_both_runs_the_prefill_and_then_the_decode() -> None:
    steps = [
        PlanStep(0, prefill=(chunk("r0", 0, 148),)),
        PlanStep(1, prefill=(chunk("r1", 128, 148),), decode=("r0",)),
    ]
    _, trace = driven(steps, prompts(2))
    assert [step["tokens"] for step in trace[:3]] == [[148], [20], [1]]
    assert trace[2]["loops"] == 1


def test_chunks_alternate_with_decodes_of_others() -> None:
    long = [i % 77 for i in range(600)]
    steps = [PlanStep(0, prefill=(chunk("r0", 0, 148),))]
    for at in range(0, 600, 100):
        steps += [
            PlanStep(at, prefill=(chunk("r1", at, at + 100),)),
            PlanStep(at + 1, decode=("r0",), loops=2),
        ]
    driver, trace = driven(steps, [*prompts(1), long])
    assert driver.rejected == []
    assert [step["tokens"] for step in trace if not step["decode"]] == [[148], *[[100]] * 6]
    assert [step["decode"] for step in trace[:5]] == [False, False, True, False, True]


def test_a_chunk_that_the_cache_holds_is_skipped() -> None:
    steps = [
        PlanStep(0, prefill=(chunk("r0", 0, 148),)),
        PlanStep(1, prefill=(chunk("r1", 0, 64),)),
        PlanStep(2, prefill=(chunk("r1", 64, 148),)),
    ]
    _, trace = driven(steps, prompts(2))
    assert [step["tokens"] for step in trace if not step["decode"]] == [[148], [20]]


def test_held_requests_wait_while_the_plan_goes_on() -> None:
    steps = [PlanStep(0, prefill=(chunk("r1", 0, 148),))]
    steps += [PlanStep(i, decode=("r1",), loops=4) for i in range(1, 4)]
    _, trace = driven(steps, prompts(2))
    assert [step["tokens"] for step in trace[:5]] == [[148], [1], [1], [1], [20]]


def test_groups_reach_the_model_inputs_with_their_rows_together() -> None:
    prompts_ = [*prompts(3), [9] * 40, [9] * 32 + [8] * 8]
    everyone = tuple(f"r{i}" for i in range(5))
    groups = (
        PrefixGroup(0, 64, ("r0", "r2", "r1")),
        PrefixGroup(64, 128, ("r0", "r2")),
        PrefixGroup(0, 32, ("r3", "r4")),
        PrefixGroup(0, 16, ("r1", "r3")),  # their blocks differ: not a group
    )
    steps = [PlanStep(0, prefill=tuple(chunk(f"r{i}", 0, len(p)) for i, p in enumerate(prompts_)))]
    order = ("r3", "r1", "r0", "r4", "r2")
    steps.append(PlanStep(1, decode=order, loops=4, groups=groups[:3]))
    steps.append(PlanStep(2, decode=everyone, loops=4, groups=groups[3:]))
    _, trace = driven(steps, prompts_)
    assert trace[1]["groups"] == [[0, 32, 0, 2], [0, 64, 2, 3], [64, 128, 3, 2]]
    for start, stop, row, rows in trace[1]["groups"]:
        tables = {
            tuple(table[start // BLOCK : stop // BLOCK])
            for table in trace[1]["blocks"][row:][:rows]
        }
        assert len(tables) == 1
    assert trace[2]["groups"] == []


def test_groups_reach_the_attention_metadata() -> None:
    groups = torch.tensor([[0, 16, 0, 2]], dtype=torch.int32)
    lengths = torch.tensor([1, 1])
    inputs = ModelInputs(
        input_ids=torch.tensor([[5, 6]]),
        seq_length=lengths,
        history_lengths=torch.tensor([20, 21]),
        block_offsets=torch.zeros(2, 2, dtype=torch.int32),
        is_decoding=True,
        num_ignored_history=torch.zeros(2, dtype=torch.int64),
        max_q_seqlen=1,
        max_kv_seqlen=22,
        sum_kv_seqlen=43,
        prefix_groups=groups,
    ).to_device("cpu")
    config = ModelConfig(64, 2, 4, 2, 1, [2], 16)
    context = StepContext.new(inputs, config)
    assert context.attn_metadata.prefix_groups is context.prefix_groups is inputs.prefix_groups
    assert inputs.prefix_groups.tolist() == [[0, 16, 0, 2]]


def test_a_plan_moves_blocks_to_the_host_and_back() -> None:
    steps = [
        PlanStep(0, prefill=(chunk("r0", 0, 148),), binds=(Bind("r0", 0, tuple(range(10))),)),
        PlanStep(
            1, prefill=(chunk("r1", 0, 40),), kv=(KVMove("device", "host", (0, 1, 9), (4, 5, 6)),)
        ),
        PlanStep(2, decode=("r1",), loops=4),
        PlanStep(
            3, decode=("r0", "r1"), loops=4, kv=(KVMove("host", "device", (4, 5, 6), (20, 21, 22)),)
        ),
        PlanStep(4, decode=("r0",), loops=2, kv=(KVMove("device", "host", (20,), (4,)),)),
    ]
    driver, trace = driven(steps, [*prompts(1), [3] * 40], num_cpu_blocks=8)
    assert driver.rejected == []
    assert [[len(side) for side in step["swaps"]] for step in trace[:5]] == [
        [0, 0],
        [0, 3],
        [0, 0],
        [3, 0],
        [1, 1],  # r0 is in this step: what the plan sent away comes straight back
    ]
    assert driver.kv.counters.spilled == driver.kv.counters.restored == 4


def test_a_decode_brings_its_blocks_back_by_itself() -> None:
    steps = [
        PlanStep(0, prefill=(chunk("r0", 0, 148),), binds=(Bind("r0", 0, tuple(range(10))),)),
        PlanStep(1, prefill=(chunk("r1", 0, 40),), kv=(KVMove("device", "host", (0, 1), (4, 5)),)),
        PlanStep(2, decode=("r0", "r1"), loops=4),
    ]
    driver, trace = driven(steps, [*prompts(1), [3] * 40], num_cpu_blocks=8)
    assert [len(step["swaps"][0]) for step in trace[:3]] == [0, 0, 2]
    assert driver.kv.counters.restored == 2


def test_what_a_plan_frees_is_the_first_victim() -> None:
    steps = [
        PlanStep(0, prefill=(chunk("r0", 0, 36),), binds=(Bind("r0", 0, (0, 1, 2)),)),
        PlanStep(1, prefill=(chunk("r1", 0, 36),), binds=(Bind("r1", 0, (3, 4, 5)),)),
        PlanStep(2, decode=("r0", "r1"), loops=4),
        PlanStep(3, prefill=(chunk("r2", 0, 9),), kv=(KVFree("device", (3, 4, 5)),)),
    ]
    driver, _ = driven(steps, [[1] * 36, [2] * 36, [3] * 9], new=5)
    scheduler, sequence = driver.scheduler, driver.requests.names.sequence
    mine = sequence(scheduler, "r1").logical_blocks[:2].tolist()
    for session in (0, 1):  # r1 is the last that was used
        scheduler.end_session(session)
    order: list[int] = []
    scheduler.block_manager.eviction_cb = lambda kind, blocks, seq: order.extend(blocks.tolist())
    assert driver.kv.make_room(scheduler.block_manager.get_num_free_gpu_blocks() + 2)
    assert order[:2] == mine[::-1]


NONSENSE = {
    "an unknown request": PlanStep(0, prefill=(chunk("ghost", 0, 10),)),
    "an unknown decode": PlanStep(0, decode=("ghost",)),
    "a request twice": PlanStep(0, prefill=(chunk("r0", 0, 16), chunk("r0", 16, 32))),
    "a span beyond the prompt": PlanStep(0, prefill=(chunk("r0", 0, 400),)),
    "an empty span": PlanStep(0, prefill=(chunk("r0", 20, 20),)),
    "a decode before its prefill": PlanStep(0, decode=("r0",), loops=2),
    "more tokens than the engine takes": PlanStep(
        0, prefill=tuple(chunk(f"r{i}", 0, 148) for i in range(4))
    ),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_dropped_and_every_request_is_answered(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    driver, _ = driven([NONSENSE[what]], prompts(4), max_prefill_token_num=500)
    assert len(driver.rejected) == 1
    assert "of the plan dropped" in caplog.text


@pytest.mark.parametrize("loops", [0, 17])
def test_loops_beyond_the_blocks_taken_ahead_are_nonsense(loops: int) -> None:
    steps = [
        PlanStep(0, prefill=(chunk("r0", 0, 148),)),
        PlanStep(1, decode=("r0",), loops=loops),
    ]
    driver, _ = driven(steps, prompts(1))
    assert driver.rejected == [f"{loops} forwards; 1 to 16 can run"]


def test_moves_of_blocks_that_are_gone_do_nothing() -> None:
    moves = (KVMove("device", "host", (77,), (1,)), KVFree("device", (99,)))
    steps = [PlanStep(0, prefill=(chunk("r0", 0, 148),), kv=moves)]
    driver, trace = driven(steps, prompts(1), num_cpu_blocks=4)
    assert driver.rejected == []
    assert trace[0]["swaps"] == [{}, {}]


class Broken:
    """A source that fails."""

    def next_step(self, view: EngineView) -> PlanStep | None:
        raise KeyError("oops")


def test_a_source_that_fails_loses_no_request() -> None:
    eng = engine()
    driver = PlanDriver(eng, Broken())

    async def work() -> Any:
        return await asyncio.gather(*[ask(eng, i, p, 20) for i, p in enumerate(prompts(3))])

    assert run(work) == [oracle(prompt, 20) for prompt in prompts(3)]
    assert set(driver.rejected) == {"the source failed"}


def test_the_view_shows_waiting_running_and_finished() -> None:
    steps = [
        PlanStep(0, prefill=(chunk("r0", 0, 148),)),
        PlanStep(1, prefill=(chunk("r1", 128, 140),)),
        PlanStep(2, decode=("r0",), loops=2),
    ]
    driver, _ = driven(steps, prompts(3), overlap=False)
    assert isinstance(driver.source, Steps)
    first, second, third = driver.source.views[:3]
    assert [seen.id for seen in first.waiting] == ["r0", "r1", "r2"]
    assert [(r.id, r.prompt_len, r.computed, r.generated) for r in second.running] == [
        ("r0", 148, 148, 1)
    ]
    assert [(r.id, r.computed, r.generated) for r in third.running] == [
        ("r0", 148, 1),
        ("r1", 140, 0),
    ]
    assert [len(prefix.blocks) for prefix in driver.view().cached] == [10, 10, 10]
    assert third.free["w0", "device"] == 256 - 10 - 1
    assert {seen.id for seen in driver.view().finished} == {"r0", "r1", "r2"}


def test_a_driver_can_be_detached() -> None:
    driver, _ = driven([], prompts(1))
    eng = driver.engine
    driver.detach()
    assert (eng.scheduler.plan_source, eng.scheduler.block_trie.hook) == (None, None)
    assert type(eng.seq_strategy).__name__ == "ARSequenceStrategy"
    assert eng.scheduler.block_manager.allocator._log_mem.access_time.dtype == "int64"


def test_engines_that_a_plan_cannot_drive_are_refused() -> None:
    eng = engine()
    eng.dist_config.dp = 2
    with pytest.raises(ValueError, match="data parallelism"):
        PlanDriver(eng, Steps([]))
    eng.dist_config.dp = 1
    eng.specdecode_config = object()
    with pytest.raises(ValueError, match="speculative"):
        PlanDriver(eng, Steps([]))


def test_a_request_that_ends_during_its_chunk_is_forgotten() -> None:
    eng = engine()
    names = Names()
    names.add("r0", 0)
    names.add("r1", 1)
    steps = [
        PlanStep(0, prefill=(chunk("r0", 0, 64),)),
        PlanStep(1, prefill=(chunk("r1", 0, 148),)),
    ]
    PlanDriver(eng, Steps(steps), NamedSequences(eng.scheduler, names))

    async def work() -> Any:
        instance = eng.create_instance()
        asking = asyncio.ensure_future(ask(eng, 0, prompts(1)[0], 5, end=False))
        while not eng.executor.trace:
            await asyncio.sleep(0)
        await instance.async_end(0)
        asking.cancel()
        return await ask(eng, 1, prompts(2)[1], 9)

    assert run(work) == oracle(prompts(2)[1], 9)
    assert eng.scheduler.seq_manager.num_sequences(MessageStatus.WAITING) == 0


def test_rows_without_room_come_right_after_the_others() -> None:
    """The plan believes in a larger pool: 24 blocks hold two of these at a time."""
    own = [[i * 7 + at % 5 for at in range(148)] for i in range(4)]
    steps = [
        PlanStep(0, prefill=tuple(chunk(f"r{i}", 0, 148) for i in range(4))),
        PlanStep(1, decode=("r0", "r1", "r2", "r3"), loops=4),
    ]
    driver, trace = driven(steps, own, num_gpu_blocks=24)
    assert trace[0]["tokens"] == [148, 148]
    assert "there is no room for its rows" in driver.rejected


def test_a_tight_budget_splits_a_planned_prefill() -> None:
    """More had to be computed than planned: what is over the budget comes in the next step."""
    steps = [PlanStep(0, prefill=tuple(chunk(f"r{i}", 100, 148) for i in range(4)))]
    own = [[i * 7 + at % 5 for at in range(148)] for i in range(4)]
    driver, trace = driven(steps, own, max_prefill_token_num=300)
    assert [step["tokens"] for step in trace[:2]] == [[148, 148], [148, 148]]
    assert driver.rejected == []


def test_a_chunk_is_not_split_where_its_token_would_be_seen() -> None:
    eng = engine()
    names = Names()
    names.add("r0", 0)
    steps = [PlanStep(0, prefill=(chunk("r0", 0, 64),))]
    PlanDriver(eng, Steps(steps), NamedSequences(eng.scheduler, names))

    async def work() -> Any:
        instance = eng.create_instance()
        config = GenerationConfig(max_new_tokens=3, ignore_eos=True, logprobs=1)
        async for _ in instance.async_stream_infer(0, prompts(1)[0], gen_config=config):
            pass

    run(work)
    assert eng.executor.trace[0]["tokens"] == [148]
