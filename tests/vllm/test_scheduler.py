"""`PlanScheduler` alone, with a worker that knows what every KV slot must hold: no model needed."""

import random
from collections.abc import Callable
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
from sagellm_ir.runtime.planner import PlanCursor
from tests.vllm import unit
from tests.vllm.worker import VOCABULARY, SymbolicWorker, answer

Answers = dict[str, list[int]]
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
ASYNCHRONOUS = pytest.mark.parametrize("asynchronous", [False, True])


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


def tick(scheduler: Any, worker: SymbolicWorker, answers: Answers) -> Any:
    """One forward, as vLLM's core runs it."""
    out = scheduler.schedule()
    assert len(out.num_scheduled_tokens) <= scheduler.target.max_batch
    assert out.total_num_scheduled_tokens <= scheduler.target.max_tokens
    for client in scheduler.update_from_output(out, worker.run(out)).values():
        for item in client.outputs:
            name = item.request_id.removesuffix("-internal")
            answers.setdefault(name, []).extend(item.new_token_ids)
    return out


def drive(
    plan: ExecutionPlan,
    requests: list[Request],
    aborted: frozenset[str] = frozenset(),
    scheduler: Any = None,
    worker: SymbolicWorker | None = None,
) -> Any:
    """Run a plan; its answers and the scheduler. `aborted` end before their second forward."""
    scheduler = scheduler or unit.make(plan.target)
    worker = worker or SymbolicWorker(unit.BLOCK)
    scheduler.driven, scheduler.source = True, PlanCursor(plan)
    for request in requests:
        made = unit.request(request.id, tokens_of(request), request.max_new_tokens)
        scheduler.add_request(made)
    answers: Answers = {request.id: [] for request in requests}
    tick(scheduler, worker, answers)
    scheduler.finish_requests(
        [f"{name}-internal" for name in aborted], RequestStatus.FINISHED_ABORTED
    )
    while not scheduler.idle:
        tick(scheduler, worker, answers)
    return answers, scheduler


@pytest.mark.parametrize("pipeline", PIPELINES)
@given(seed=st.integers(0, 2**20), data=st.data())
@settings(max_examples=10)
def test_any_plan(pipeline: str, seed: int, data: st.DataObject) -> None:
    """Every row reads right KV, every answer is plain decoding's, and nothing leaks."""
    requests = workload(seed)
    names = [request.id for request in requests]
    aborted = data.draw(st.frozensets(st.sampled_from(names), max_size=2))
    plan = compile_requests(requests, unit.target(BLOCKS), pipeline).plan
    answers, scheduler = drive(plan, requests, aborted)
    for request in requests:
        whole = answer(tokens_of(request), request.max_new_tokens)
        if request.id in aborted:
            assert answers[request.id] == whole[: len(answers[request.id])]
        else:
            assert answers[request.id] == whole
    retained = sum(len(held.blocks) for held in plan.retained)
    free = scheduler.view().free
    assert sum(free.values()) == sum(t.blocks for t in plan.target.tiers) - retained
    for request in requests:
        scheduler.release(request.id)
    assert scheduler.view().finished == ()
    assert scheduler.has_finished_requests()  # the workers will be told


def serve(asynchronous: bool, seed: int, pace: int, choose: Callable[[list[str]], str]) -> None:
    """Requests that come and go while others run, planned tick by tick: every one finishes.

    Two that are chosen are aborted, and some end with a token that nobody knew of.
    """
    core = unit.Core(unit.target(BLOCKS), asynchronous)
    scheduler = core.scheduler
    requests = workload(seed, 12)
    stops = {request.id: seed % 7 + at for at, request in enumerate(requests) if at % 3 == 0}
    waiting, aborted = list(requests), set[str]()
    for now in range(2000):
        if waiting and now % pace == 0:
            request = waiting.pop(0)
            ends = [stops[request.id]] if request.id in stops else []
            made = unit.request(request.id, tokens_of(request), request.max_new_tokens, stop=ends)
            scheduler.add_request(made)
        if now in (7, 11) and scheduler.sequences:
            name = choose(sorted(scheduler.sequences))
            aborted.add(name)
            scheduler.finish_requests(f"{name}-internal", RequestStatus.FINISHED_ABORTED)
        if core.busy:
            core.tick()
        elif not waiting:
            break
    assert not core.busy
    assert scheduler.sequences == {}
    for request in requests:
        whole = answer(tokens_of(request), request.max_new_tokens)
        if (stop := stops.get(request.id)) in whole:
            whole = whole[: whole.index(stop) + 1]
        got = core.answers.get(request.id, [])
        assert got == (whole[: len(got)] if request.id in aborted else whole)


@ASYNCHRONOUS
@given(seed=st.integers(0, 2**20), pace=st.integers(1, 5), data=st.data())
@settings(max_examples=30)
def test_online(asynchronous: bool, seed: int, pace: int, data: st.DataObject) -> None:
    serve(asynchronous, seed, pace, lambda names: data.draw(st.sampled_from(names)))


def test_what_began_to_decode_rests_in_a_full_step() -> None:
    """A chunk takes all tokens of a forward, by a plan in which the other row rests: it rests."""
    names = iter(("r1", "r5"))
    serve(False, 568251, 1, lambda _: next(names))


def test_tenants_share_nothing() -> None:
    """vLLM's cache salt keeps equal prompts apart; without it, the prefix is computed once."""
    prompt = tuple(range(4 * unit.BLOCK))
    computed = {}
    options = {"sagellm_pipeline": FRONT.replace("dedup", "dedup{gated=false}") + ",evict"}
    for salts in ((None, None), ("a", "b")):
        scheduler = unit.make(unit.target(32), additional_config=options)
        worker = SymbolicWorker(unit.BLOCK)
        for name, salt in zip("xy", salts, strict=True):
            scheduler.add_request(unit.request(name, (*prompt, ord(name) % 50), 3, salt))
        while scheduler.has_requests():
            tick(scheduler, worker, {})
        computed[salts] = scheduler.stats.prefill_tokens
    assert computed[None, None] == len(prompt) + 2
    assert computed["a", "b"] == 2 * (len(prompt) + 1)


@ASYNCHRONOUS
def test_the_next_turn_computes_what_is_new(asynchronous: bool) -> None:
    """Blocks of an answer are found again, as default vLLM finds them."""
    core = unit.Core(unit.target(32), asynchronous)
    scheduler = core.scheduler
    text, computed = tuple(range(3 * unit.BLOCK)), []
    for turn, more in enumerate(((), (7, 8, 9))):
        text += more
        before = scheduler.stats.prefill_tokens
        scheduler.add_request(unit.request(f"turn{turn}", text, 9))
        while core.busy:
            core.tick()
        computed.append(scheduler.stats.prefill_tokens - before)
        assert core.answers[f"turn{turn}"] == answer(text, 9)
        text += tuple(core.answers[f"turn{turn}"])
    kept = (computed[0] + 8) // unit.BLOCK * unit.BLOCK  # all of its tokens but the last have KV
    assert computed[1] == computed[0] + 9 + 3 - kept


@ASYNCHRONOUS
def test_a_prefix_that_gave_way_comes_back_from_the_host(asynchronous: bool) -> None:
    core = unit.Core(unit.target(BLOCKS), asynchronous)
    scheduler = core.scheduler
    documents = [tuple(range(first, first + 9 * unit.BLOCK)) for first in (0, 10)]
    computed = []
    for turn, document in enumerate((*documents, documents[0])):
        before = scheduler.stats.prefill_tokens
        scheduler.add_request(unit.request(f"q{turn}", (*document, turn), 3))
        while core.busy:
            core.tick()
        assert core.answers[f"q{turn}"] == answer((*document, turn), 3)
        computed.append(scheduler.stats.prefill_tokens - before)
    assert computed[0] == computed[1] == len(documents[0]) + 1
    assert computed[2] == 1
    assert scheduler.stats.moved_blocks > 0


@ASYNCHRONOUS
def test_prompts_that_end_with_their_block_in_a_full_pool(asynchronous: bool) -> None:
    """An answer that cannot take its next block waits; it is not decoded in the steps of others."""
    rng = random.Random(0)
    documents = [tuple(rng.randrange(VOCABULARY) for _ in range(80)) for _ in range(6)]
    prompts = [(*document, at, at, at, at) for at in range(4) for document in documents]
    rng.shuffle(prompts)
    core = unit.Core(unit.target(96, host=256, tokens=64, batch=8), asynchronous)
    for at, prompt in enumerate(prompts):
        core.scheduler.add_request(unit.request(f"r{at}", prompt, 3))
    while core.busy:
        core.tick()
    assert core.answers == {f"r{at}": answer(prompt, 3) for at, prompt in enumerate(prompts)}
    assert core.scheduler.stats.prefill_tokens < sum(map(len, prompts))


@ASYNCHRONOUS
def test_an_asynchronous_engine_never_waits(asynchronous: bool) -> None:
    """Forwards of a batch that decodes follow one another, and none is more than it has to be."""
    core = unit.Core(unit.target(32), asynchronous)
    for at in range(3):
        core.scheduler.add_request(unit.request(f"r{at}", (at, 1, 2), 9))
    ticks = 0
    while core.busy:
        core.tick()
        ticks += 1
    assert core.scheduler.stats.forwards == 9
    assert ticks <= 12


@ASYNCHRONOUS
def test_what_the_workers_cannot_know_yet_is_waited_for(asynchronous: bool) -> None:
    """A row whose blocks move, and one that computes its answer again, need the token in flight."""
    core = unit.Core(unit.target(8), asynchronous)
    prompt = (1, 2, 3, 4, 5)
    moved = KVMove("device", "device", (0, 1, 2), (3, 4, 5))
    steps = iter(
        [
            PlanStep(0, binds=(Bind("a", 0, (0, 1, 2)),), prefill=(PrefillChunk("a", 0, 5),)),
            PlanStep(1, decode=("a",)),
            PlanStep(2, kv=(moved,), binds=(Bind("a", 0, (3, 4, 5)),), decode=("a",)),
            PlanStep(3, decode=("a",)),
            PlanStep(4, prefill=(PrefillChunk("a", 0, 9),)),
            PlanStep(5, decode=("a",)),
        ]
    )
    core.scheduler.source = SimpleNamespace(next_step=lambda view: next(steps, None))
    core.scheduler.add_request(unit.request("a", prompt, 6))
    while core.busy:
        core.tick()
    assert core.answers["a"] == answer(prompt, 6)
    assert core.scheduler.stats.forwards == 6


def test_a_request_that_never_fits_is_ended() -> None:
    scheduler, worker = unit.make(unit.target(4)), SymbolicWorker(unit.BLOCK)
    scheduler.add_request(unit.request("huge", tuple(range(20)), 9))
    scheduler.add_request(unit.request("small", (1, 2, 3), 2))
    ends = []
    for _ in range(9):
        out = scheduler.schedule()
        for client in scheduler.update_from_output(out, worker.run(out)).values():
            ends += [(item.request_id, str(item.finish_reason)) for item in client.outputs]
    assert ("huge-internal", "error") in ends
    assert scheduler.get_request_counts() == (0, 0)


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
        scheduler, worker = unit.make(plan.target, cascade), SymbolicWorker(unit.BLOCK)
        assert scheduler.takes_groups == (cascade and check_version() in CASCADE)
        drive(plan, requests, scheduler=scheduler, worker=worker)
        assert max(worker.common) == (5 if scheduler.takes_groups else 0)


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
        drive(spoil(plan), requests)


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
    steps = iter([REFUSED[message]])
    scheduler.source = SimpleNamespace(next_step=lambda view: next(steps, None))
    with pytest.raises(SageIRError, match=message):
        scheduler.schedule()
    assert scheduler.schedule().total_num_scheduled_tokens == 0  # it goes on with the next step


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
