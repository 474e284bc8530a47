"""`PlanScheduler` alone, with a worker that knows what every KV slot must hold: no model needed."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.plan import (
    Bind,
    ExecutionPlan,
    KVMove,
    PlanStep,
    PrefillChunk,
    PrefixGroup,
)
from sagellm_ir.passes.pipeline import PRESETS
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime.engines.vllm.batch import common_blocks
from sagellm_ir.runtime.engines.vllm.versions import CASCADE, check_version
from tests.vllm import unit
from tests.vllm.worker import VOCABULARY, answer

FRONT = "canonicalize,prefix-dedup,kv-reuse,chunk-prefill,disaggregate,schedule"
PIPELINES = [
    *PRESETS,
    *(
        f"{FRONT},evict{{policy={p}, spill={s}}}"
        for p in ("lru", "belady")
        for s in ("always", "never")
    ),
]
BLOCKS = 14


def workload(seed: int, count: int = 8) -> list[Request]:
    """Questions about two documents; some jump the queue."""
    rng = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(length))

    documents = [tokens(rng.randint(3, 6) * unit.BLOCK) for _ in range(2)]
    found = []
    for at in range(count):
        shared = documents[at % 2][: rng.randint(1, 6) * unit.BLOCK]
        prompt = TokenPrompt(shared + tokens(rng.randint(1, 12)))
        new, priority = rng.randint(1, 9), rng.choice((0, 0, 1))
        found.append(Request(f"r{at}", prompt=prompt, max_new_tokens=new, priority=priority))
    return found


def tokens_of(request: Request) -> tuple[int, ...]:
    assert isinstance(request.prompt, TokenPrompt)
    return request.prompt.tokens


def drive(
    plan: ExecutionPlan,
    requests: list[Request],
    aborted: frozenset[str] = frozenset(),
    **options: bool,
) -> unit.Core:
    """Run a plan. `aborted` end after its first step. Options: of `unit.make`."""
    core = unit.Core(unit.make(plan.target, **options))
    scheduler = core.scheduler
    scheduler.driven = True
    for request in requests:
        made = unit.request(request.id, tokens_of(request), request.max_new_tokens)
        scheduler.add_request(made)
    for number, step in enumerate(plan.steps):
        scheduler.give(step)
        while scheduler.busy:
            core.tick()
        if not number:
            scheduler.finish_requests(
                [f"{name}-internal" for name in aborted], RequestStatus.FINISHED_ABORTED
            )
    return core


@pytest.mark.parametrize("pipeline", PIPELINES)
@given(seed=st.integers(0, 2**20), data=st.data())
@settings(max_examples=10)
def test_any_plan(pipeline: str, seed: int, data: st.DataObject) -> None:
    """Every row reads right KV, every answer is plain decoding's, and nothing leaks."""
    requests = workload(seed)
    names = [request.id for request in requests]
    aborted = data.draw(st.frozensets(st.sampled_from(names), max_size=2))
    plan = compile_requests(requests, unit.target(BLOCKS), pipeline).plan
    core = drive(plan, requests, aborted)
    scheduler = core.scheduler
    for request in requests:
        whole = answer(tokens_of(request), request.max_new_tokens)
        if request.id in aborted:
            got = core.answers.get(request.id, [])
            assert got == whole[: len(got)]
        else:
            assert core.answers[request.id] == whole
    retained = sum(len(held.blocks) for held in plan.retained)
    free = scheduler.view().free
    assert sum(free.values()) == sum(t.blocks for t in plan.target.tiers) - retained
    for request in requests:
        scheduler.release(request.id)
    assert scheduler.view().finished == ()
    assert scheduler.has_finished_requests()  # the workers will be told


def test_prefix_groups_reach_vllm() -> None:
    """Where its attention can use them: the document behind all rows of a decode, and no more."""
    rng = random.Random(0)
    document = tuple(rng.randrange(VOCABULARY) for _ in range(5 * unit.BLOCK))
    requests = [
        Request(f"r{at}", prompt=TokenPrompt((*document, at, at + 1)), max_new_tokens=5)
        for at in range(3)
    ]
    plan = compile_requests(requests, unit.target(32), "O2").plan
    assert any(step.groups for step in plan.steps)
    for cascade in (True, False):
        core = drive(plan, requests, cascade=cascade)
        takes = core.scheduler.takes_groups
        assert takes == (cascade and check_version() in CASCADE)
        assert max(core.worker.common) == (5 if takes else 0)


def test_what_some_rows_share_reaches_the_workers() -> None:
    """Two documents behind one start: kernels are told of all three, where the workers have them."""
    rng = random.Random(0)
    start, *documents = (tuple(rng.randrange(VOCABULARY) for _ in range(8)) for _ in range(3))
    requests = [
        Request(f"r{at}", prompt=TokenPrompt((*start, *document, at, at + 1)), max_new_tokens=5)
        for at, document in enumerate(documents * 2)
    ]
    plan = compile_requests(requests, unit.target(40, batch=4), "O2").plan
    for kernels in (True, False):
        core = drive(plan, requests, cascade=False, kernels=kernels)
        seen = set(core.worker.kernels.seen)
        assert seen >= {(8, 4), (8, 2)} if kernels else not seen
        assert core.scheduler.reads_once == kernels


def test_common_blocks() -> None:
    """Of groups that cover all rows, from the first token on, without a gap."""
    rows: Any = [
        SimpleNamespace(sequence=SimpleNamespace(name=name), start=start)
        for name, start in (("a", 23), ("b", 40))
    ]
    both, one = ("a", "b", "c"), ("a", "c")
    cases = (
        (((0, 8, both),), 2),
        (((0, 8, both), (8, 16, both)), 4),
        (((0, 8, both), (8, 16, one)), 2),
        (((8, 16, both),), 0),
        (((0, 8, one),), 0),
        (((0, 32, both),), 5),  # the first row has computed 23 tokens
    )
    for spans, blocks in cases:
        groups = [PrefixGroup(*span) for span in spans]
        assert common_blocks(groups, rows, 4) == blocks
        assert common_blocks(groups, rows[:1], 4) == 0


# Plans that are wrong: the worker sees it, or the scheduler refuses them.


def wrong_block(plan: ExecutionPlan) -> ExecutionPlan:
    """Another table entry where a follower takes over its leader's first block."""
    seen = set[int]()
    for number, step in enumerate(plan.steps):
        for at, bind in enumerate(step.binds):
            if bind.at == 0 and bind.blocks[0] in seen:
                other = (bind.blocks[0] + 7) % BLOCKS
                binds = list(step.binds)
                binds[at] = evolve(bind, blocks=(other, *bind.blocks[1:]))
                return _with(plan, number, evolve(step, binds=tuple(binds)))
            seen.update(bind.blocks)
    raise AssertionError("nothing is shared")


def lost_fetch(plan: ExecutionPlan) -> ExecutionPlan:
    """Without the copy that brings KV back."""
    for number, step in enumerate(plan.steps):
        kept = tuple(k for k in step.kv if not (isinstance(k, KVMove) and k.from_tier == "host"))
        if kept != step.kv:
            return _with(plan, number, evolve(step, kv=kept))
    raise AssertionError("nothing is fetched")


def _with(plan: ExecutionPlan, number: int, step: PlanStep) -> ExecutionPlan:
    return evolve(plan, steps=(*plan.steps[:number], step, *plan.steps[number + 1 :]))


@pytest.mark.parametrize("spoil", [wrong_block, lost_fetch])
def test_a_spoiled_plan_is_caught(spoil: Any) -> None:
    pipeline = f"{FRONT},evict{{policy=lru, spill=always}}"
    for seed in range(100):
        requests = workload(seed)
        plan = compile_requests(requests, unit.target(BLOCKS), pipeline).plan
        if any(isinstance(k, KVMove) and k.from_tier == "host" for s in plan.steps for k in s.kv):
            break
    with pytest.raises(AssertionError, match="wrong KV"):
        drive(spoil(plan), requests, kernels=False)


def test_groups_that_do_not_share_are_refused() -> None:
    """Attention would read the blocks of one request for another."""
    core = unit.Core(unit.make(unit.target(8)))
    core.scheduler.driven = True

    def run(**step: Any) -> None:
        core.scheduler.give(PlanStep(0, **step))
        core.tick()

    for at, name in enumerate("abc"):
        core.scheduler.add_request(unit.request(name, (1, 2, 3, 4, 5), 4))
        run(binds=(Bind(name, 0, (0, at + 1)),), prefill=(PrefillChunk(name, 0, 5),))
    run(decode=("a", "b", "c"), groups=(PrefixGroup(0, 4, ("a", "b", "c")),))
    wrong = (PrefixGroup(0, 8, ("a", "b", "c")),)
    run(decode=("a",), groups=wrong)  # the others are not there
    with pytest.raises(SageIRError, match=r"'b' and 1 more requests share tokens \[0, 8\)"):
        run(decode=("b", "c"), groups=wrong)


ROW = PrefillChunk("a", 0, 3)
TABLE = Bind("a", 0, (0,))
REFUSED = {
    "request 'b', which was never submitted": PlanStep(0, decode=("b",)),
    "worker 'w9'": PlanStep(0, "w9"),
    "its blocks on worker 'w0' hold 0": PlanStep(0, prefill=(ROW,)),
    "block 99 of tier 'device', which has 8": PlanStep(0, binds=(Bind("a", 0, (99,)),)),
    "block -1 of tier": PlanStep(0, binds=(Bind("a", 0, (-1,)),)),
    "no holes": PlanStep(0, binds=(Bind("a", 1, (0,)),)),
    "tier 'disk'": PlanStep(0, kv=(KVMove("device", "disk", (0,), (0,)),)),
    "from worker 'w1'": PlanStep(0, kv=(KVMove("device", "device", (0,), (0,), "w1"),)),
    "names 2 destinations": PlanStep(0, kv=(KVMove("device", "host", (0,), (0, 1)),)),
    r"tokens \[0, 9\) of request 'a', which has 3": PlanStep(
        0, binds=(Bind("a", 0, (0, 1, 2)),), prefill=(PrefillChunk("a", 0, 9),)
    ),
    "stands in it twice": PlanStep(0, binds=(TABLE,), prefill=(ROW,), decode=("a",)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_step_that_cannot_run_is_refused(message: str) -> None:
    scheduler = unit.make(unit.target(8))
    scheduler.driven = True
    scheduler.add_request(unit.request("a", (1, 2, 3), 4))
    scheduler.give(REFUSED[message])
    with pytest.raises(SageIRError, match=message):
        scheduler.schedule()
    assert not scheduler.busy  # it goes on with the next step
    assert scheduler.schedule().total_num_scheduled_tokens == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"speculative_config": SimpleNamespace()}, "speculative decoding"),
        ({"kv_transfer_config": None}, "PlanConnector"),
        ({"use_v2_model_runner": True}, "second model runner"),
    ],
)
def test_an_engine_that_plans_cannot_drive(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SageIRError, match=message):
        unit.make(unit.target(8), **config)
