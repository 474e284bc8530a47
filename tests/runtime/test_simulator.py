"""The simulator: time, tokens and counters of plans, without a model."""

import pytest
from attrs import evolve
from hypothesis import given, settings

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.plan import ExecutionPlan, KVMove, PlanRequest, PlanStep
from sagellm_ir.nodes import Decode, KVFetch, KVMigrate, Prefill
from sagellm_ir.runtime.backend import EngineView, InferenceBackend
from sagellm_ir.runtime.engines.simulator import SimulatorEngine
from sagellm_ir.runtime.planner import PlanCursor
from sagellm_ir.target import Target, Tier, Worker
from tests.lowering.plans import graphs
from tests.lowering.toy import scheduled

TARGET = Target(
    block_size=4, max_tokens=16, max_loops=4, tiers=(Tier("device", 16), Tier("host", 4))
)
DECLS = (
    RequestDecl("r0", prompt_len=10, max_new_tokens=3, blocks=(0, 1)),
    RequestDecl("r1", prompt_len=9, max_new_tokens=5, blocks=(0, 1), arrival=100.0),
)
PLAN = lower(scheduled(TARGET, DECLS))


def test_it_is_an_engine() -> None:
    assert isinstance(SimulatorEngine(TARGET), InferenceBackend)
    assert SimulatorEngine(TARGET).view() == EngineView()


@given(graphs())
@settings(deadline=None)
def test_time_is_what_the_plan_predicts(graph: IRGraph) -> None:
    plan = lower(graph)
    report = SimulatorEngine(plan.target).execute(plan)
    assert report.busy_seconds == pytest.approx(sum(step.cost for step in plan.steps), abs=1e-6)
    assert [r.generated for r in report.requests] == [r.max_new_tokens for r in plan.requests]


def test_a_report_says_what_happened() -> None:
    report = SimulatorEngine(TARGET).execute(PLAN)
    first, second = report.requests
    assert (first.computed_tokens, second.computed_tokens) == (10, 1)
    assert report.hit_ratio == pytest.approx(8 / 19)
    assert report.generated == 8
    assert report.throughput == pytest.approx(8 / report.seconds)
    assert report.prefill_tokens == 11
    # Step 1 waits for the arrival of r1, and r0 gets its first token in it.
    assert second.ttft is not None
    assert 0 < second.ttft < 1
    assert first.ttft == pytest.approx(100 + second.ttft)
    assert second.finish == report.seconds


def test_tokens_are_the_same_in_every_run() -> None:
    def run() -> list[tuple[str, int, int | None, str | None]]:
        engine = SimulatorEngine(TARGET)
        for request in PLAN.requests:
            engine.submit(request)
        events = engine.stream(PlanCursor(PLAN))
        return [(event.request, event.index, event.token, event.finish) for event in events]

    events = run()
    assert events == run()
    for name, count in (("r0", 3), ("r1", 5)):
        mine = [event for event in events if event[0] == name]
        assert [index for _, index, _, _ in mine] == list(range(count))
        assert [finish for *_, finish in mine] == [None] * (count - 1) + ["length"]


def test_an_answer_may_end_by_itself() -> None:
    engine = SimulatorEngine(TARGET, {"r1": 2})
    report = engine.execute(PLAN)
    assert [request.generated for request in report.requests] == [3, 2]
    assert {view.id: view.finish for view in engine.view().finished} == {
        "r0": "length",
        "r1": "stop",
    }
    assert report.seconds < SimulatorEngine(TARGET).execute(PLAN).seconds


def test_an_aborted_request_makes_no_tokens() -> None:
    engine = SimulatorEngine(TARGET)
    for request in PLAN.requests:
        engine.submit(request)
    engine.abort("r1")
    events = [event for event in engine.stream(PlanCursor(PLAN)) if event.request == "r1"]
    assert [(event.token, event.finish) for event in events] == [(None, "abort")]
    engine.release("r1")
    assert {view.id for view in engine.view().finished} == {"r0"}


def test_moves_take_time_and_are_counted() -> None:
    nodes = (
        KVFetch("hit", "r", 0, 4, step=0),
        Prefill("p", "r", 4, 6, operands=("hit",), step=0),
        KVMigrate("h", "r", 4, 6, operands=("p",), step=1),
        KVFetch("f", "r", 4, 6, operands=("h", "hit"), step=2),
        Decode("d", "r", 6, 9, operands=("f",), step=3, until=4),
    )
    decls = (RequestDecl("r", prompt_len=6, max_new_tokens=3, blocks=(7,)),)
    cache = (CachedBlocks("host", blocks=(7,)),)
    graph = IRGraph("m", TARGET, decls, nodes, cache, "scheduled", (1, 0, 0, 1, 1))
    engine = SimulatorEngine(TARGET)
    report = engine.execute(lower(graph))
    assert (report.reloaded_blocks, report.spilled_blocks) == (2, 1)
    assert report.moved_bytes == 3 * TARGET.block_bytes
    assert report.hit_ratio == pytest.approx(4 / 6)
    assert engine.stats().moved_blocks == 3
    assert engine.stats().move_seconds > 0


def test_workers_run_side_by_side() -> None:
    target = evolve(TARGET, workers=(Worker("a"), Worker("b")))
    decls = tuple(
        RequestDecl(name, prompt_len=6, max_new_tokens=1, blocks=(n,))
        for n, name in enumerate("xy")
    )
    nodes = (
        Prefill("p", "x", 0, 6, step=0, worker="a"),
        Decode("d", "x", 6, 7, operands=("p",), step=0, until=0, worker="a"),
        Prefill("q", "y", 0, 6, step=1, worker="b"),
        Decode("e", "y", 6, 7, operands=("q",), step=1, until=1, worker="b"),
    )
    plan = lower(IRGraph("w", target, decls, nodes, (), "scheduled", (1, 1)))
    report = SimulatorEngine(target).execute(plan)
    assert report.busy_seconds == pytest.approx(2 * report.seconds)


def broken(step: PlanStep) -> ExecutionPlan:
    return evolve(PLAN, steps=(step,))


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(SageIRError, match="unknown worker 'w9'"):
        SimulatorEngine(TARGET).execute(broken(PlanStep(0, "w9")))
    with pytest.raises(SageIRError, match="never submitted"):
        SimulatorEngine(TARGET).execute(broken(PlanStep(0, decode=("x",))))
    move = KVMove("device", "disk", (0,), (0,))
    with pytest.raises(SageIRError, match="unknown tier 'disk'"):
        SimulatorEngine(TARGET).execute(broken(PlanStep(0, kv=(move,))))
    engine = SimulatorEngine(TARGET)
    engine.submit(PlanRequest("r", prompt_len=1))
    with pytest.raises(SageIRError, match="running already"):
        engine.submit(PlanRequest("r", prompt_len=1))
