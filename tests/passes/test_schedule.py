"""Properties of `schedule`: any valid graph gets a valid schedule, and it is always the same."""

from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import Decode
from sagellm_ir.passes.base import PassContext
from sagellm_ir.passes.chunk_prefill import ChunkPrefill
from sagellm_ir.passes.schedule import Schedule
from sagellm_ir.target import DEVICE, Tier
from sagellm_ir.verify import check_capacity, verify
from tests.strategies import graphs

BUILT = ("built", "placed")


@st.composite
def tight(draw: st.DrawFn) -> IRGraph:
    """Graphs on a target of small budgets, with just room for the largest request."""
    graph = draw(graphs(stages=BUILT))
    target = graph.target
    tiers = tuple(tier for tier in target.tiers if tier.name != DEVICE)
    return graph.replace(
        target=evolve(
            target,
            max_tokens=draw(st.integers(1, 40)),
            max_batch=draw(st.integers(1, 4)),
            tiers=(Tier(DEVICE, draw(st.sampled_from((60, 120, 4096)))), *tiers),
        )
    )


@settings(max_examples=300, deadline=None)
@given(graphs(stages=BUILT) | tight(), st.booleans())
def test_any_graph_is_scheduled_by_the_laws(graph: IRGraph, arrivals: bool) -> None:
    verify(graph)
    graph = ChunkPrefill().run(graph, PassContext())
    result = Schedule(arrivals=arrivals).run(graph, PassContext())
    assert result.stage == "scheduled"
    verify(result)
