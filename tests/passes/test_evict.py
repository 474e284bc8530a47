"""Properties of `evict`: whatever is scheduled fits afterwards, and stays a valid schedule."""

from attrs import evolve
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.base import PassContext
from sagellm_ir.passes.chunk_prefill import ChunkPrefill
from sagellm_ir.passes.evict import Evict
from sagellm_ir.passes.kv_policy import POLICIES
from sagellm_ir.passes.schedule import Schedule
from sagellm_ir.target import DEVICE, HOST, Tier
from sagellm_ir.text import print_graph
from sagellm_ir.verify import check_capacity, verify
from tests.strategies import graphs

thorough = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@st.composite
def tight(draw: st.DrawFn, host: st.SearchStrategy[int]) -> IRGraph:
    """Scheduled graphs on a device with hardly more room than one request needs."""
    graph = draw(graphs(stages=("built", "placed"), max_requests=8))
    size = graph.target.block_size
    longest = max(-(-request.stop // size) for request in graph.requests)
    tiers = (
        Tier(DEVICE, longest + draw(st.integers(0, 8))),
        Tier(HOST, draw(host), bandwidth=draw(st.sampled_from((1e6, 1e12)))),
    )
    target = evolve(graph.target, tiers=tiers, max_tokens=draw(st.sampled_from((8, 40, 2048))))
    graph = ChunkPrefill().run(graph.replace(target=target), PassContext())
    try:
        return Schedule().run(graph, PassContext())
    except SageIRError:  # round trips over the host in the graph take room, too
        assume(False)
        raise


@thorough
@given(
    tight(st.just(1000)),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(("auto", "always", "never")),
)
def test_what_is_scheduled_fits_afterwards(graph: IRGraph, policy: str, spill: str) -> None:
    verify(graph)
    result = Evict(policy, spill).run(graph, PassContext())
    verify(result)
    check_capacity(result)
