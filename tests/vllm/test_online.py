"""`PlanScheduler` by itself: it plans what reaches vLLM tick by tick, synchronously and not."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from sagellm_ir.lowering.plan import Bind, KVMove, PlanStep, PrefillChunk
from tests.vllm import unit
from tests.vllm.test_scheduler import BLOCKS, FRONT, tokens_of, workload
from tests.vllm.worker import VOCABULARY, answer

ASYNCHRONOUS = pytest.mark.parametrize("asynchronous", [False, True])


def serve(asynchronous: bool, seed: int, pace: int, choose: Callable[[list[str]], str]) -> None:
    """Requests that come and go while others run, planned tick by tick: every one finishes.

    Two that are chosen are aborted, and some end with a token that nobody knew of.
    """
    core = unit.Core(unit.make(unit.target(BLOCKS)), asynchronous)
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
        core = unit.Core(unit.make(unit.target(32), additional_config=options))
        for name, salt in zip("xy", salts, strict=True):
            core.scheduler.add_request(unit.request(name, (*prompt, ord(name) % 50), 3, salt))
        while core.busy:
            core.tick()
        computed[salts] = core.scheduler.stats.prefill_tokens
    assert computed[None, None] == len(prompt) + 2
    assert computed["a", "b"] == 2 * (len(prompt) + 1)


@ASYNCHRONOUS
def test_the_next_turn_computes_what_is_new(asynchronous: bool) -> None:
    """Blocks of an answer are found again, as default vLLM finds them."""
    core = unit.Core(unit.make(unit.target(32)), asynchronous)
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
def test_an_answer_that_stopped_is_found_again(asynchronous: bool) -> None:
    """A forward of it is in flight when its end is seen."""
    core = unit.Core(unit.make(unit.target(32)), asynchronous)
    prompt = tuple(range(3 * unit.BLOCK))
    whole = answer(prompt, 20)
    core.scheduler.add_request(unit.request("first", prompt, 20, stop=[whole[9]]))
    while core.busy:
        core.tick()
    said = (*prompt, *core.answers["first"])
    assert len(prompt) + unit.BLOCK < len(said) < len(prompt) + 20
    before = core.scheduler.stats.prefill_tokens
    core.scheduler.add_request(unit.request("next", (*said, 7), 1))
    while core.busy:
        core.tick()
    kept = (len(said) - 1) // unit.BLOCK * unit.BLOCK
    assert core.scheduler.stats.prefill_tokens - before == len(said) + 1 - kept


@ASYNCHRONOUS
def test_a_prefix_that_gave_way_comes_back_from_the_host(asynchronous: bool) -> None:
    core = unit.Core(unit.make(unit.target(BLOCKS)), asynchronous)
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
    assert not scheduler.steps.moves, "they pile up: nobody takes them"


@ASYNCHRONOUS
def test_prompts_that_end_with_their_block_in_a_full_pool(asynchronous: bool) -> None:
    """An answer that cannot take its next block waits; it is not decoded in the steps of others."""
    rng = random.Random(0)
    documents = [tuple(rng.randrange(VOCABULARY) for _ in range(80)) for _ in range(6)]
    prompts = [(*document, at, at, at, at) for at in range(4) for document in documents]
    rng.shuffle(prompts)
    core = unit.Core(unit.make(unit.target(96, host=256, tokens=64, batch=8)), asynchronous)
    for at, prompt in enumerate(prompts):
        core.scheduler.add_request(unit.request(f"r{at}", prompt, 3))
    while core.busy:
        core.tick()
    assert core.answers == {f"r{at}": answer(prompt, 3) for at, prompt in enumerate(prompts)}
    assert core.scheduler.stats.prefill_tokens < sum(map(len, prompts))


@ASYNCHRONOUS
def test_an_asynchronous_engine_never_waits(asynchronous: bool) -> None:
    """Forwards of a batch that decodes follow one another, and none is more than it has to be."""
    core = unit.Core(unit.make(unit.target(32)), asynchronous)
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
    core = unit.Core(unit.make(unit.target(8)), asynchronous)
    prompt = (1, 2, 3, 4, 5)
    moved = KVMove("device", "device", (0, 1, 2), (3, 4, 5))
    steps = [
        PlanStep(0, binds=(Bind("a", 0, (0, 1, 2)),), prefill=(PrefillChunk("a", 0, 5),)),
        PlanStep(1, decode=("a",)),
        PlanStep(2, kv=(moved,), binds=(Bind("a", 0, (3, 4, 5)),), decode=("a",)),
        PlanStep(3, decode=("a",)),
        PlanStep(4, prefill=(PrefillChunk("a", 0, 9),)),
        PlanStep(5, decode=("a",)),
    ]
    core.scheduler.driven = True
    core.scheduler.add_request(unit.request("a", prompt, 6))
    for step in steps:
        core.scheduler.give(step)
        while core.scheduler.busy:
            core.tick()
    while core.busy:
        core.tick()
    assert core.answers["a"] == answer(prompt, 6)
    assert core.scheduler.stats.forwards == 6


def test_a_request_that_never_fits_is_ended() -> None:
    core = unit.Core(unit.make(unit.target(4)))
    core.scheduler.add_request(unit.request("huge", tuple(range(20)), 9))
    core.scheduler.add_request(unit.request("small", (1, 2, 3), 2))
    while core.busy:
        core.tick()
    assert core.ends == {"huge": "error", "small": "length"}
    assert core.scheduler.get_request_counts() == (0, 0)
