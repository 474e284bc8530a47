"""Plans as tables and timelines."""

from attrs import evolve
from hypothesis import given, settings
from syrupy.assertion import SnapshotAssertion

from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.picture import plan_dot
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.lowering.render import plan_bars, plan_mermaid, plan_rows, plan_text
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.target import Target, Worker
from tests.lowering.plans import graphs
from tests.lowering.test_lower import cached
from tests.lowering.test_verify_plan import PLAN


def disaggregated() -> ExecutionPlan:
    """Two requests that share two blocks, prefilled on one worker and decoded on another."""
    prompts = [tuple(range(40)), (*range(32), 7, 8, 9)]
    requests = [
        Request(name, prompt=TokenPrompt(tokens), max_new_tokens=4)
        for name, tokens in zip("ab", prompts, strict=True)
    ]
    workers = (Worker("p", role="prefill"), Worker("d", role="decode"))
    return compile_requests(requests, evolve(Target(), workers=workers)).plan


def test_a_table() -> None:
    lines = [line.split() for line in plan_text(PLAN).splitlines()]
    assert lines[0] == [
        "step",
        "worker",
        "start",
        "ms",
        "prefill",
        "decode",
        "shared",
        "moved",
        "used",
    ]
    assert lines[1][4:] == ["r0[0:8]", "2"]
    assert lines[2][4:] == ["r0[8:10]", "r1[8:9]", "8", "4"]
    assert lines[3][4:] == ["r0", "r1", "x2", "8", "6"]
    assert lines[5][4:] == ["0"]


def test_a_table_fits_a_terminal() -> None:
    prompts = (tuple(range(length, 3 * length)) for length in range(16, 32))
    requests = [
        Request(f"request-{number}", prompt=TokenPrompt(tokens), max_new_tokens=4)
        for number, tokens in enumerate(prompts)
    ]
    plan = compile_requests(requests, Target()).plan
    whole, cut = plan_text(plan).splitlines(), plan_text(plan, 100).splitlines()
    assert max(map(len, whole)) > 300
    assert max(map(len, cut)) == 100
    assert cut[1].count("…") == 1
    assert [line.split()[-1] for line in cut] == [line.split()[-1] for line in whole]
    assert plan_text(PLAN, 200) == plan_text(PLAN)


def test_moves_are_in_the_table() -> None:
    first = next(plan_rows(cached(blocks=16)))
    assert first.moved == "1 host>device"
    assert first.used == 6


def test_bars_join_neighbours() -> None:
    bars = [(bar.request, bar.kind, bar.first, bar.last) for bar in plan_bars(PLAN)]
    assert bars == [
        ("r0", "prefill", 0, 1),
        ("r0", "decode", 2, 2),
        ("r1", "prefill", 1, 1),
        ("r1", "decode", 2, 3),
    ]


def test_a_chart_has_a_section_for_each_request() -> None:
    chart = plan_mermaid(PLAN)
    assert chart.startswith("gantt\n  title toy\n")
    assert chart.count("  section ") == 2
    assert chart.count(" : active, ") == 2


def test_a_picture_has_a_row_for_each_worker(snapshot: SnapshotAssertion) -> None:
    assert plan_dot(disaggregated()) == snapshot


def test_a_picture_shows_what_is_shared() -> None:
    assert "share [0:8] r0 r1" in plan_dot(PLAN)


@given(graphs())
@settings(deadline=None)
def test_every_plan_can_be_shown(graph: IRGraph) -> None:
    plan = lower(graph)
    rows = list(plan_rows(plan))
    assert len(plan_text(plan).splitlines()) == len(plan.steps) + 1
    assert rows[-1].used == 0
    assert plan_dot(plan).count("[label = ") == len(plan.steps)
    assert {bar.request for bar in plan_bars(plan)} == {request.id for request in plan.requests}
