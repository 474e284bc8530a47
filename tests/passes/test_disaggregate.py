"""Properties of `disaggregate`: any valid graph is placed by the laws, and can go on from there."""

from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.base import PassContext
from sagellm_ir.passes.chunk_prefill import ChunkPrefill
from sagellm_ir.passes.disaggregate import Disaggregate
from sagellm_ir.passes.evict import Evict
from sagellm_ir.passes.schedule import Schedule
from sagellm_ir.target import Worker
from sagellm_ir.verify import check_capacity, verify
from tests.strategies import graphs

thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ROLES = (
    ("general",),
    ("general", "general", "general"),
    ("prefill", "decode"),
    ("decode", "prefill", "decode", "prefill"),
    ("general", "prefill", "decode"),
)


@st.composite
def built(draw: st.DrawFn) -> IRGraph:
    """Built graphs for workers of several roles."""
    graph = draw(graphs(stages=("built",), max_requests=8))
    workers = tuple(Worker(f"w{i}", role) for i, role in enumerate(draw(st.sampled_from(ROLES))))
    return graph.replace(target=evolve(graph.target, workers=workers))


@thorough
@given(built())
def test_any_graph_is_placed_by_the_laws(graph: IRGraph) -> None:
    verify(graph)
    ctx = PassContext()
    placed = Disaggregate().run(graph, ctx)
    verify(placed)
    scheduled = Schedule().run(ChunkPrefill().run(placed, ctx), ctx)
    verify(scheduled)
    check_capacity(Evict().run(scheduled, ctx))
