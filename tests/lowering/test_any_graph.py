"""Whatever the verifier lets through lowers to a legal plan: spills, drops, caches, workers."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.verify_plan import verify_plan
from sagellm_ir.passes.base import PassContext
from sagellm_ir.passes.evict import Evict
from sagellm_ir.runtime.engines.simulator import SimulatorEngine
from sagellm_ir.verify import check_capacity
from tests.passes.test_evict import tight
from tests.strategies import graphs

quick = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@quick
@given(graphs(stages=("scheduled",)))
def test_a_valid_schedule_lowers(graph: IRGraph) -> None:
    check_capacity(graph)
    plan = lower(graph)
    verify_plan(plan)
    assert len(plan.steps) in (len(graph.loops), len(graph.loops) + 1)
    report = SimulatorEngine(graph.target).execute(plan)
    assert all(request.finish is not None for request in report.requests)
    verify_plan(lower(graph, retain=True))


@quick
@given(tight(st.just(1000)), st.sampled_from(("auto", "always", "never")))
def test_what_evict_fits_lowers_into_that_space(graph: IRGraph, spill: str) -> None:
    graph = Evict(spill=spill).run(graph, PassContext())
    verify_plan(lower(graph))
    verify_plan(lower(graph, retain=True))
