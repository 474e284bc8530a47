"""The engine does what steps say: hand-written plans give the tokens of plain greedy decoding."""

import pytest
from attrs import evolve

from sagellm_ir.lowering.plan import Bind, KVFree, KVMove, PlanStep, PrefillChunk, PrefixGroup
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.backend import EngineView, InferenceBackend, PlanSource
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine, attention, random_model
from sagellm_ir.target import Target
from tests.embedded.tiny import (
    SEED,
    answers,
    blocks_of,
    decode,
    oracle,
    prefill,
    prompt,
    request,
    run,
)

A, B = prompt(37, 1), prompt(29, 2)
NEW = 9
DOC = prompt(24, 5)
FOLLOWER = DOC + prompt(7, 6)


@pytest.fixture(params=["views", "copies"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny contexts normally take the copying path: also force reading in place and sharing."""
    if request.param == "views":
        monkeypatch.setattr(attention, "VIEW_TOKENS", 0)
        monkeypatch.setattr(attention, "SHARE_TOKENS", 0)


def test_it_is_a_backend(engine: EmbeddedEngine) -> None:
    assert isinstance(engine, InferenceBackend)


@pytest.mark.usefixtures("way")
def test_chunks_and_scattered_blocks(model: CausalLM, engine: EmbeddedEngine) -> None:
    engine.submit(request("a", A, NEW))
    table = tuple(reversed(blocks_of(len(A) + NEW, 3)))
    steps = [
        prefill("a", 10, table),
        PlanStep(0, prefill=(PrefillChunk("a", 10, 11),)),
        PlanStep(0, prefill=(PrefillChunk("a", 11, 36),)),
        PlanStep(0, prefill=(PrefillChunk("a", 36, 37),)),
    ]
    events = run(engine, *steps, decode("a", loops=3), decode("a", loops=NEW - 4))
    assert answers(events) == {"a": oracle(model, A, NEW)}
    assert [e.finish for e in events] == [None] * (NEW - 1) + ["length"]


@pytest.mark.usefixtures("way")
def test_prefill_and_decode_in_one_batch(model: CausalLM, engine: EmbeddedEngine) -> None:
    engine.submit(request("a", A, NEW))
    engine.submit(request("b", B, NEW))
    bind = Bind("b", 0, blocks_of(len(B) + NEW, 40))
    mixed = PlanStep(1, binds=(bind,), prefill=(PrefillChunk("b", 0, 20),), decode=("a",))
    rest = PlanStep(2, prefill=(PrefillChunk("b", 20, len(B)),), decode=("a",))
    start = prefill("a", len(A), blocks_of(len(A) + NEW, 0))
    events = run(engine, start, mixed, rest, decode("a", "b", loops=6), decode("b", loops=2))
    assert answers(events) == {"a": oracle(model, A, NEW), "b": oracle(model, B, NEW)}


def shared_steps(group: bool) -> list[PlanStep]:
    """Two requests on one document; the second binds the first one's blocks."""
    doc = blocks_of(len(DOC), 8)
    own = (50, 40, 45, 33)
    groups = (PrefixGroup(0, len(DOC), ("a", "b")),) if group else ()
    chunk = PrefillChunk("b", len(DOC), len(FOLLOWER))
    return [
        prefill("a", len(DOC), (*doc, 20, 21, 22, 23)),
        # b builds on a's document while a goes on in the same forward
        PlanStep(
            1,
            binds=(Bind("b", 0, (*doc, *own)),),
            prefill=(chunk, PrefillChunk("a", len(DOC), len(DOC) + 5)),
            groups=groups,
        ),
        PlanStep(2, decode=("a", "b"), loops=NEW - 1, groups=groups),
    ]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("group", [False, True])
def test_shared_blocks(model: CausalLM, engine: EmbeddedEngine, group: bool) -> None:
    first = DOC + prompt(5, 9)
    engine.submit(request("a", first, NEW))
    engine.submit(request("b", FOLLOWER, NEW))
    events = run(engine, *shared_steps(group))
    assert answers(events) == {"a": oracle(model, first, NEW), "b": oracle(model, FOLLOWER, NEW)}


def test_a_chunk_builds_on_another_of_its_step(model: CausalLM, engine: EmbeddedEngine) -> None:
    engine.submit(request("a", DOC, NEW))
    engine.submit(request("b", FOLLOWER, NEW))
    doc = blocks_of(len(DOC), 8)
    binds = (Bind("a", 0, (*doc, 20, 21, 22)), Bind("b", 0, (*doc, 30, 31, 32, 33)))
    chunks = (PrefillChunk("b", 24, len(FOLLOWER)), PrefillChunk("a", 0, 24))
    events = run(engine, PlanStep(0, binds=binds, prefill=chunks), decode("a", "b", loops=NEW - 1))
    assert answers(events) == {"a": oracle(model, DOC, NEW), "b": oracle(model, FOLLOWER, NEW)}


def spilled(drop_fetch: bool) -> list[PlanStep]:
    """A request spilled to the host, overwritten, and fetched into other blocks."""
    old, new = blocks_of(len(A) + NEW, 0), blocks_of(len(A) + NEW, 30)
    kept = old[:10]
    out = (KVMove("device", "host", kept, tuple(range(5, 15))), KVFree("device", old))
    back = KVMove("host", "device", tuple(range(5, 15)), new[:10])
    return [
        prefill("a", len(A), old),
        decode("a", loops=2),
        PlanStep(
            2,
            kv=out,
            binds=(Bind("b", 0, old[: -(-(len(B) + NEW) // 4)]),),
            prefill=(PrefillChunk("b", 0, len(B)),),
        ),
        PlanStep(
            3,
            kv=() if drop_fetch else (back, KVFree("host", tuple(range(5, 15)))),
            binds=(Bind("a", 0, new),),
            decode=("a", "b"),
            loops=6,
        ),
        decode("b", loops=2),
    ]


@pytest.mark.usefixtures("way")
def test_spill_and_fetch_elsewhere(model: CausalLM, engine: EmbeddedEngine) -> None:
    engine.submit(request("a", A, NEW))
    engine.submit(request("b", B, NEW))
    events = run(engine, *spilled(drop_fetch=False))
    assert answers(events) == {"a": oracle(model, A, NEW), "b": oracle(model, B, NEW)}
    assert engine.stats().moved_blocks == 20


def test_a_dropped_fetch_shows(model: CausalLM, engine: EmbeddedEngine) -> None:
    """Negative control: the comparison can fail, and fails for exactly the request concerned."""
    engine.submit(request("a", A, NEW))
    engine.submit(request("b", B, NEW))
    found = answers(run(engine, *spilled(drop_fetch=True)))
    assert found["a"] != oracle(model, A, NEW)
    assert found["b"] == oracle(model, B, NEW)


def test_rematerialisation(model: CausalLM, engine: EmbeddedEngine) -> None:
    """A dropped answer in progress is computed again, generated tokens included."""
    engine.submit(request("a", A, NEW))
    again = PlanStep(
        2,
        kv=(KVFree("device", blocks_of(len(A) + NEW, 0)),),
        binds=(Bind("a", 0, blocks_of(len(A) + NEW, 40)),),
        prefill=(PrefillChunk("a", 0, len(A)), PrefillChunk("a", len(A), len(A) + 2)),
    )
    start = prefill("a", len(A), blocks_of(len(A) + NEW, 0))
    events = run(engine, start, decode("a", loops=2), again, decode("a", loops=NEW - 3))
    assert answers(events) == {"a": oracle(model, A, NEW)}


def test_migration_between_workers(model: CausalLM, engine: EmbeddedEngine) -> None:
    engine.submit(request("a", A, NEW))
    there = (9, 3, 20, 21, 22, 40, 41, 42, 7, 8, 50, 51)
    blocks = blocks_of(len(A), 0)
    move = KVMove("device", "device", blocks, there[: len(blocks)], from_worker="w0")
    gone = KVFree("device", blocks, worker="w0")
    steps = [
        prefill("a", len(A), blocks),
        PlanStep(1, "w1", (move, gone), (Bind("a", 0, there),), decode=("a",), loops=NEW - 1),
    ]
    assert answers(run(engine, *steps)) == {"a": oracle(model, A, NEW)}
    free = engine.view().free
    assert (free["w0", "device"], free["w1", "device"]) == (64, 64 - len(there))


def test_early_end_is_skipped(model: CausalLM, target: Target) -> None:
    """The end token ends a request; rows that the plan still has for it do not run."""
    expected = oracle(model, A, NEW)
    ending = random_model(evolve(model.config, eos=(expected[3],)), seed=SEED)
    engine = EmbeddedEngine(ending, target)
    engine.submit(request("a", A, NEW))
    engine.submit(request("b", B, NEW))
    events = run(
        engine,
        prefill("a", len(A), blocks_of(len(A) + NEW, 0)),
        prefill("b", len(B), blocks_of(len(B) + NEW, 20)),
        decode("a", "b", loops=NEW - 1),
    )
    assert answers(events)["a"] == expected[: expected.index(expected[3]) + 1]
    assert [e.finish for e in events if e.request == "a"][-1] == "stop"
    assert engine.stats().decode_tokens < 2 * (NEW - 1)


def test_abort_keeps_its_blocks_for_others(model: CausalLM, engine: EmbeddedEngine) -> None:
    first = DOC + prompt(5, 9)
    engine.submit(request("a", first, NEW))
    engine.submit(request("b", FOLLOWER, NEW))
    engine.abort("a")
    engine.abort("a")
    events = run(engine, *shared_steps(group=True))
    assert [(e.request, e.token, e.finish) for e in events[:1]] == [("a", None, "abort")]
    assert answers(events) == {"b": oracle(model, FOLLOWER, NEW)}


def test_seeded_draws_do_not_depend_on_the_batch(model: CausalLM, target: Target) -> None:
    hot = Sampling(temperature=1.5, top_p=0.9, top_k=50, seed=11)
    found = []
    for company in (False, True):
        engine = EmbeddedEngine(model, target)
        engine.submit(request("a", A, NEW), hot)
        steps = [prefill("a", len(A), blocks_of(len(A) + NEW, 0))]
        names = ["a"]
        if company:
            engine.submit(request("b", B, NEW), evolve(hot, seed=12))
            steps.insert(0, prefill("b", len(B), blocks_of(len(B) + NEW, 20)))
            names.insert(0, "b")
        found.append(answers(run(engine, *steps, decode(*names, loops=NEW - 1)))["a"])
    assert found[0] == found[1]
    assert found[0] != oracle(model, A, NEW)


class Listed:
    """A plan source over a list, which keeps what it was shown."""

    def __init__(self, *steps: PlanStep) -> None:
        self.steps = list(steps)
        self.views: list[EngineView] = []

    def next_step(self, view: EngineView) -> PlanStep | None:
        """See `PlanSource`."""
        self.views.append(view)
        return self.steps.pop(0) if self.steps else None


def test_stream_and_view(model: CausalLM, engine: EmbeddedEngine) -> None:
    engine.submit(request("a", A, NEW))
    table = blocks_of(len(A) + NEW, 0)
    gone = PlanStep(3, kv=(KVFree("device", table[5:]),))
    source = Listed(
        prefill("a", 8, table),
        PlanStep(1, prefill=(PrefillChunk("a", 8, len(A)),)),
        decode("a", loops=NEW - 1),
        gone,
    )
    assert isinstance(source, PlanSource)
    assert answers(list(engine.stream(source))) == {"a": oracle(model, A, NEW)}
    first, second, *_, last = source.views
    assert [v.id for v in first.waiting] == ["a"]
    assert not first.cached
    assert [(v.id, v.computed, v.generated) for v in second.running] == [("a", 8, 0)]
    assert [v.finish for v in last.finished] == ["length"]
    # All but the last token's KV is there; what was freed is no cache any more.
    assert [prefix.blocks for prefix in last.cached] == [table[:5]]
    assert first.free["w0", "device"] == 64
    assert last.free["w0", "device"] == 59
    engine.release("a")
    assert not engine.view().finished
