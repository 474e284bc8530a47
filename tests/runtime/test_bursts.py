"""Many requests at once: the first step is given out before all of them are compiled."""

from unittest.mock import patch

from attrs import evolve
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.lowering.verify_plan import verify_plan
from sagellm_ir.runtime import sharing
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.target import DEVICE, Target, Tier
from tests.runtime.checked_engine import CheckedEngine

TARGET = Target(
    block_size=4,
    max_tokens=32,
    max_batch=16,
    max_loops=4,
    mixed=False,
    tiers=(Tier("device", 400), Tier("host", 40)),
)
DOCUMENTS = ([1] * 8, [2] * 40, [3] * 16 + [4] * 40)
PROMPTS = st.tuples(st.sampled_from(([], *DOCUMENTS)), st.sampled_from((1, 5, 9, 33, 70)))


def request(name: str, tokens: list[int], new: int = 6, priority: int = 0) -> PlanRequest:
    return PlanRequest(
        name,
        max_new_tokens=new,
        priority=priority,
        prompt_len=len(tokens),
        tokens=tuple(tokens),
    )


def come(engine: CheckedEngine, planner: OnlinePlanner, requests: list[PlanRequest]) -> None:
    for new in requests:
        planner.submit(new)
        engine.submit(new)


def finish(engine: CheckedEngine, planner: OnlinePlanner) -> tuple[list[PlanStep], int]:
    """All steps until nothing is left, and how many requests the first fragment was made of."""
    steps, compiled = list[PlanStep](), 0
    while (step := planner.next_step(engine.view())) is not None:
        assert planner.plan is not None
        verify_plan(planner.plan)
        compiled = compiled or len(planner.plan.requests)
        steps.append(step)
        engine.step(step)
    return steps, compiled


def run(
    requests: list[PlanRequest], *, ahead: bool, target: Target = TARGET, before: bool = False
) -> tuple[list[PlanStep], int]:
    """All steps, and how many requests the first fragment was made of."""
    engine, planner = CheckedEngine(target), OnlinePlanner(target, ahead=ahead)
    if before:  # a document is cached
        come(engine, planner, [request("before", [*DOCUMENTS[0], 5], 1)])
        finish(engine, planner)
    come(engine, planner, requests)
    steps, compiled = finish(engine, planner)
    answers = {seen.id: seen.generated for seen in engine.report().requests}
    assert all(answers[new.id] == new.max_new_tokens for new in requests)
    return steps, compiled


def test_a_long_shared_prefix_starts_with_one_request_and_the_rest_follows_as_planned() -> None:
    requests = [request(str(at), [*DOCUMENTS[1], 9 + at]) for at in range(12)]
    steps, compiled = run(requests, ahead=True)
    assert compiled == 1
    assert (steps, 12) == run(requests, ahead=False)


def test_requests_that_share_nothing_start_with_those_that_fill_a_step() -> None:
    requests = [request(str(at), [9 + at] * 15) for at in range(12)]
    steps, compiled = run(requests, ahead=True)
    assert compiled == 3
    assert [(c.request, c.start, c.stop) for c in steps[0].prefill] == [("0", 0, 15), ("1", 0, 15)]
    assert (steps, 12) == run(requests, ahead=False)


def test_those_that_follow_in_the_first_step_are_not_left_out() -> None:
    shared = [request(str(at), [*DOCUMENTS[0], 9 + at]) for at in range(12)]
    assert run(shared, ahead=True)[1] == 12
    late = [request(str(at), [9 + at] * 40) for at in range(11)]
    urgent = evolve(late[0], id="urgent", deadline=1.0)
    assert run([*late, urgent], ahead=True)[1] == 12


def test_a_first_step_that_is_not_full_is_given_up() -> None:
    pipeline = "kv-reuse,chunk-prefill,schedule{fill=false}"
    engine, planner = CheckedEngine(TARGET), OnlinePlanner(TARGET, pipeline, ahead=True)
    come(engine, planner, [request("before", [*DOCUMENTS[0], 5])])
    finish(engine, planner)
    requests = [request(str(at), [100 + at] * 14) for at in range(1, 12)]
    come(engine, planner, [request("0", [*DOCUMENTS[0], *[7] * 12]), *requests])
    step = planner.next_step(engine.view())
    assert step is not None
    assert planner.plan is not None
    assert len(planner.plan.requests) == 12
    engine.step(step)
    finish(engine, planner)
    assert planner._ledger[DEVICE].room == 400  # nothing is held any more


@given(
    st.lists(st.tuples(PROMPTS, st.integers(1, 9), st.integers(0, 1)), min_size=4, max_size=16),
    st.booleans(),
    st.booleans(),
    st.sampled_from((60, 400)),
)
@settings(deadline=None, max_examples=40, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_the_first_step_is_the_one_that_all_of_them_would_have(
    asked: list[tuple[tuple[list[int], int], int, int]], mixed: bool, before: bool, blocks: int
) -> None:
    tiers = (Tier("device", blocks), Tier("host", 40))
    target = evolve(TARGET, mixed=mixed, tiers=tiers)
    requests = [
        request(str(at), [*document, *[100 + at] * own], new, priority)
        for at, ((document, own), new, priority) in enumerate(asked)
    ]
    with patch.object(sharing, "_LONG", 2):  # as if these tables were long
        steps, _ = run(requests, ahead=True, target=target, before=before)
    whole, _ = run(requests, ahead=False, target=target, before=before)
    assert steps[0] == whole[0]
