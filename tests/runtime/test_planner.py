"""The plan sources: whatever comes and goes, every request gets its tokens from its own KV."""

import pytest
from attrs import evolve
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import RequestDecl
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.plan import PlanRequest
from sagellm_ir.lowering.verify_plan import verify_plan
from sagellm_ir.runtime import requests
from sagellm_ir.runtime.backend import EngineView, PlanSource
from sagellm_ir.runtime.planner import OnlinePlanner, PlanCursor
from sagellm_ir.target import Target, Tier, Worker
from tests.lowering.plans import decls, targets
from tests.lowering.toy import scheduled
from tests.runtime.checked_engine import CheckedEngine

PIPELINE = "O2"
TARGET = Target(
    block_size=4,
    max_tokens=32,
    max_batch=4,
    max_loops=3,
    tiers=(Tier("device", 24), Tier("host", 24)),
)


def request(name: str, tokens: list[int], new: int) -> PlanRequest:
    return PlanRequest(name, max_new_tokens=new, prompt_len=len(tokens), tokens=tuple(tokens))


def online(
    requests: list[tuple[int, PlanRequest]],
    lengths: dict[str, int] | None = None,
    target: Target = TARGET,
    reserve: int | None = None,
) -> tuple[CheckedEngine, OnlinePlanner]:
    """Submit each request after so many steps; run until all is done."""
    engine = CheckedEngine(target, lengths)
    planner = OnlinePlanner(target, PIPELINE, reserve=reserve)
    queue = sorted(requests, key=lambda item: item[0])
    taken = 0
    while True:
        while queue and queue[0][0] <= taken:
            _, new = queue.pop(0)
            engine.submit(new)
            planner.submit(new)
        step = planner.next_step(engine.view())
        if planner.plan is not None:
            verify_plan(planner.plan)
        if step is not None:
            engine.step(step)
            taken += 1
        elif queue:
            taken = queue[0][0]
        else:
            return engine, planner


def test_both_are_plan_sources() -> None:
    plan = lower(scheduled(TARGET, ()))
    assert isinstance(PlanCursor(plan), PlanSource)
    assert isinstance(OnlinePlanner(TARGET, PIPELINE), PlanSource)


def test_a_cursor_gives_every_step_once() -> None:
    plan = lower(scheduled(TARGET, [RequestDecl("r", prompt_len=3, max_new_tokens=4)]))
    cursor = PlanCursor(plan)
    view = EngineView()
    steps = []
    while step := cursor.next_step(view):
        steps.append(step)
    assert tuple(steps) == plan.steps
    assert cursor.next_step(view) is None


def test_nothing_submitted_is_nothing_to_do() -> None:
    assert OnlinePlanner(TARGET, PIPELINE).next_step(EngineView()) is None


def test_one_epoch_when_the_world_keeps_to_the_plan() -> None:
    engine, planner = online([(0, request("a", [1] * 9, 5)), (0, request("b", [1] * 9, 7))])
    assert planner.epochs == 1
    report = engine.report()
    assert [r.generated for r in report.requests] == [5, 7]
    assert report.hit_ratio > 0.4


def test_a_request_under_way_goes_on_without_recomputing() -> None:
    engine, planner = online([(0, request("a", [1] * 9, 12)), (2, request("b", [2] * 5, 3))])
    assert planner.epochs >= 2
    report = engine.report()
    assert [r.generated for r in report.requests] == [12, 3]
    assert report.prefill_tokens == 9 + 5


def test_an_epoch_compiles_what_has_come() -> None:
    document = [5] * 12
    first = [(0, request(f"r{at}", [*document, at], 9)) for at in range(2)]
    engine, planner = online([*first, (2, request("late", [*document, 7], 9))])
    assert planner.epochs == 2
    assert planner.plan is not None
    assert [one.id for one in planner.plan.requests] == ["late"]
    assert [len(held.ids) for held in planner.plan.resident] == [3]
    assert engine.report().requests[2].computed_tokens == 1


def test_requests_of_different_epochs_share_their_prefix_in_one_group() -> None:
    document = [5] * 12
    engine, planner = CheckedEngine(TARGET), OnlinePlanner(TARGET, PIPELINE)
    step = None
    for name in ("a", "b"):
        new = request(name, [*document, ord(name)], 20)
        engine.submit(new)
        planner.submit(new)
        for _ in range(2):
            step = planner.next_step(engine.view())
            assert step is not None
            engine.step(step)
    assert step is not None
    assert [(g.start, g.stop, set(g.requests)) for g in step.groups] == [(0, 12, {"a", "b"})]


def test_a_step_may_outlast_the_first_answer_to_end() -> None:
    target = evolve(TARGET, mixed=False, max_loops=16)
    loops = {}
    for outlast in (False, True):
        planner = OnlinePlanner(target, PIPELINE, outlast=outlast)
        engine = CheckedEngine(target)
        for name, new in (("a", 4), ("b", 12)):
            engine.submit(request(name, [ord(name)] * 5, new))
            planner.submit(request(name, [ord(name)] * 5, new))
        steps = []
        while (step := planner.next_step(engine.view())) is not None:
            steps.append(step.loops)
            if outlast and step.decode:
                break  # This engine cannot: its tables end where answers do.
            engine.step(step)
        loops[outlast] = steps
    assert loops == {False: [1, 3, 8, 0], True: [1, 11]}


def running(*names: str, new: int = 4) -> tuple[CheckedEngine, OnlinePlanner]:
    """An engine in which these requests have their first token."""
    engine = CheckedEngine(TARGET)
    planner = OnlinePlanner(TARGET, PIPELINE)
    come(engine, planner, *names, new=new)
    step = planner.next_step(engine.view())
    assert step is not None
    engine.step(step)
    return engine, planner


def come(engine: CheckedEngine, planner: OnlinePlanner, *names: str, new: int = 4) -> None:
    for name in names:
        engine.submit(request(name, [ord(name)] * 5, new))
        planner.submit(request(name, [ord(name)] * 5, new))
        planner.meet(name)


def finish(engine: CheckedEngine, planner: OnlinePlanner) -> dict[str, int]:
    """Run to the end; the tokens of each answer."""
    while (step := planner.next_step(engine.view())) is not None:
        engine.step(step)
    return {one.id: one.generated for one in engine.report().requests}


def test_what_comes_while_the_last_tokens_are_in_flight_is_compiled_alone() -> None:
    engine, planner = running("a", "b")
    last = planner.next_step(engine.view())
    assert last is not None
    assert last.loops == 3  # All that is planned of both; their ends are not known yet.
    come(engine, planner, "c")
    planner.compile_ahead()
    assert planner.plan is not None
    assert [one.id for one in planner.plan.requests] == ["c"]
    engine.step(last)
    step = planner.next_step(engine.view())
    assert step is not None
    assert [chunk.request for chunk in step.prefill] == ["c"]
    engine.step(step)
    assert finish(engine, planner) == {"a": 4, "b": 4, "c": 4}


def test_who_comes_after_a_plan_was_made_ahead_joins_its_first_step() -> None:
    engine, planner = running("a", new=9)
    decode = planner.next_step(engine.view())
    assert decode is not None
    come(engine, planner, "b")
    planner.compile_ahead()
    come(engine, planner, "c")
    engine.step(decode)
    step = planner.next_step(engine.view())
    assert step is not None
    assert sorted(chunk.request for chunk in step.prefill) == ["b", "c"]
    engine.step(step)
    assert finish(engine, planner) == {"a": 9, "b": 4, "c": 4}


def test_a_decode_goes_ahead_behind_a_decode_but_not_behind_a_prefill() -> None:
    engine, planner = running("a", "b", new=9)
    assert planner.step_ahead() is None  # their first tokens are in flight
    first = planner.next_step(engine.view())
    assert first is not None
    ahead = planner.step_ahead()
    assert ahead is not None
    assert (ahead.decode, ahead.loops) == (first.decode, 3)
    come(engine, planner, "c")
    behind = planner.step_ahead()
    assert behind is not None
    assert [chunk.request for chunk in behind.prefill] == ["c"]  # what has come goes first
    assert planner.step_ahead() is None
    for step in (first, ahead, behind):
        engine.step(step)
    assert finish(engine, planner) == {"a": 9, "b": 9, "c": 4}


def test_rows_that_end_in_flight_are_not_in_the_step_ahead() -> None:
    target = evolve(TARGET, mixed=False)
    engine, planner = CheckedEngine(target), OnlinePlanner(target, PIPELINE)
    come(engine, planner, "a", new=9)
    come(engine, planner, "b", new=4)
    prefill = planner.next_step(engine.view())
    assert prefill is not None
    engine.step(prefill)
    decode = planner.next_step(engine.view())
    ahead = planner.step_ahead()
    assert decode is not None
    assert ahead is not None
    assert (decode.decode, decode.loops, ahead.decode) == (("a", "b"), 3, ("a",))
    engine.step(decode)
    engine.step(ahead)
    assert finish(engine, planner) == {"a": 9, "b": 4}


def test_who_comes_joins_a_prompt_that_has_begun_if_its_next_step_has_room() -> None:
    """Of 32 tokens a step: the rest of the first prompt is 8."""
    for left, together in ((8, True), (20, False)):
        target = evolve(TARGET, mixed=False)
        engine, planner = CheckedEngine(target), OnlinePlanner(target, PIPELINE)
        engine.submit(request("a", [7] * (32 + left), 2))
        planner.submit(request("a", [7] * (32 + left), 2))
        step = planner.next_step(engine.view())
        assert step is not None
        assert planner.has_space() == together
        come(engine, planner, "b")
        engine.step(step)
        step = planner.next_step(engine.view())
        assert step is not None
        assert {chunk.request for chunk in step.prefill} == ({"a", "b"} if together else {"a"})
        engine.step(step)
        assert finish(engine, planner) == {"a": 2, "b": 4}


def test_what_the_engine_dropped_is_planned_again() -> None:
    _, planner = running("a", "b", new=9)
    planner.lost("a", 1)
    planner.lost("ghost", 1)
    step = planner.advance({"a": 1, "b": 1}.__getitem__)
    assert step is not None
    assert [(chunk.request, chunk.stop) for chunk in step.prefill] == [("a", 6)]
    assert step.decode == ("b",)


def test_an_early_end_makes_room() -> None:
    engine, planner = online(
        [(0, request("a", [1] * 9, 60)), (0, request("b", [2] * 9, 40))], {"a": 3, "b": 5}
    )
    assert [r.generated for r in engine.report().requests] == [3, 5]
    assert not planner._steps.rows


def test_an_answer_grows_beyond_what_was_reserved() -> None:
    engine, planner = online([(0, request("a", [1] * 9, 20))], reserve=6)
    assert planner.epochs > 2
    assert [r.generated for r in engine.report().requests] == [20]


def test_a_later_request_hits_the_prompt_of_one_that_ended() -> None:
    document = list(range(16))
    engine, _ = online(
        [(0, request("a", [*document, 50], 2)), (30, request("b", [*document, 60, 61], 2))]
    )
    second = engine.report().requests[1]
    assert second.computed_tokens == 2


def test_ids_of_blocks_that_nobody_has_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_FEW", 16)
    traffic = [(3 * i, request(f"r{i}", [i // 2] * 17, 2)) for i in range(80)]
    engine, planner = online(traffic)
    assert len(planner._requests._ids) < 80  # of 160 blocks seen; the pools hold 48
    # Every second request finds the four blocks of the one before it: none was forgotten too soon.
    assert [r.computed_tokens for r in engine.report().requests] == [17, 1] * 40


def test_an_aborted_request_is_not_planned_again() -> None:
    engine, planner = CheckedEngine(TARGET), OnlinePlanner(TARGET, PIPELINE)
    for name in ("a", "b"):
        new = request(name, [ord(name)] * 6, 40)
        engine.submit(new)
        planner.submit(new)
    step = planner.next_step(engine.view())
    assert step is not None
    engine.step(step)
    engine.abort("a")
    events = list(engine.stream(planner))
    assert {event.request for event in events if event.token is not None} == {"b"}


def test_what_cannot_be_planned_is_refused() -> None:
    planner = OnlinePlanner(TARGET, PIPELINE)
    with pytest.raises(SageIRError, match="token ids are missing"):
        planner.submit(PlanRequest("t", prompt_len=3))
    with pytest.raises(SageIRError, match="needs KV of 108 tokens, and the pool holds 96"):
        planner.submit(request("t", [1] * 8, 100))
    planner.submit(request("t", [1], 1))
    with pytest.raises(SageIRError, match="of this id is running"):
        planner.submit(request("t", [1], 1))
    with pytest.raises(SageIRError, match="one worker"):
        OnlinePlanner(evolve(TARGET, workers=(Worker("a"), Worker("b"))), PIPELINE)


@given(st.data())
@settings(deadline=None, max_examples=40, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_any_traffic_is_answered_from_its_own_kv(data: st.DataObject) -> None:
    target = evolve(
        data.draw(targets()),
        tiers=(Tier("device", data.draw(st.integers(12, 40))), Tier("host", 20)),
    )
    traffic = []
    lengths = {}
    for decl in data.draw(decls()):
        tokens = [block for block in decl.blocks for _ in range(4)]
        tokens += [99] * (decl.prompt_len - len(tokens))
        new = data.draw(st.integers(1, 16))
        traffic.append((data.draw(st.integers(0, 12)), request(decl.id, tokens, new)))
        lengths[decl.id] = data.draw(st.integers(1, new))
    reserve = data.draw(st.none() | st.integers(1, 6))
    engine, _ = online(traffic, lengths, target, reserve)
    assert {r.id: r.generated for r in engine.report().requests} == lengths


def test_what_is_not_computed_again_yet_is_not_found() -> None:
    """A request is aborted while it computes for the second time what was dropped of it."""
    planner = OnlinePlanner(evolve(TARGET, max_tokens=5, max_loops=1), PIPELINE)
    prompt, answer = [1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    planner.submit(request("a", prompt, 30))
    planner.meet("a")
    for made in range(len(answer)):
        assert planner.advance({"a": made}.__getitem__) is not None
    planner.lost("a", len(answer))
    step = planner.advance(lambda _: len(answer))
    assert step is not None
    (again,) = step.prefill
    assert again.stop % TARGET.block_size  # it ends inside a block
    planner.end("a", [*prompt, *answer])
    planner.submit(request("b", [*prompt, *answer, 18], 2))
    planner.meet("b")
    step = planner.advance(lambda _: 0)
    assert step is not None
    assert step.prefill[0].start <= again.stop
