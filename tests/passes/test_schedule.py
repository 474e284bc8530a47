"""Properties of `schedule`: any valid graph gets a valid schedule, and it is always the same."""

from typing import Any

import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.nodes import Decode, IRNode, Prefill
from sagellm_ir.passes.base import PassContext
from sagellm_ir.passes.chunk_prefill import ChunkPrefill
from sagellm_ir.passes.schedule import Schedule
from sagellm_ir.passes.scheduling.problem import flatten
from sagellm_ir.passes.scheduling.simulate import simulate
from sagellm_ir.passes.scheduling.timeline import Limit
from sagellm_ir.target import DEVICE, Target, Tier
from sagellm_ir.text import print_graph
from sagellm_ir.verify import verify
from tests.strategies import graphs

BUILT = ("built", "placed")
thorough = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@st.composite
def tight(draw: st.DrawFn) -> IRGraph:
    """Graphs on a target of small budgets."""
    graph = draw(graphs(stages=BUILT))
    target = graph.target
    tiers = tuple(tier for tier in target.tiers if tier.name != DEVICE)
    return graph.replace(
        target=evolve(
            target,
            max_tokens=draw(st.integers(1, 40)),
            max_batch=draw(st.integers(1, 4)),
            tiers=(Tier(DEVICE, draw(st.sampled_from((200, 4096)))), *tiers),
        )
    )


@thorough
@given(graphs(stages=BUILT) | tight(), st.booleans(), st.booleans())
def test_any_graph_is_scheduled_by_the_laws(graph: IRGraph, arrivals: bool, fill: bool) -> None:
    graph = ChunkPrefill().run(graph, PassContext())
    item = Schedule(arrivals=arrivals, fill=fill)
    result = item.run(graph, PassContext())
    assert result.stage == "scheduled"
    verify(result)  # among other things: answered once, budgets kept, forwards as needed
    assert print_graph(item.run(graph, PassContext())) == print_graph(result)
    for trace in item.trace(graph):
        steps = [node.step or 0 for node in result.nodes if _of(node, trace.request)]
        assert trace.first == min(steps)
        assert trace.admitted - trace.ready >= sum(trace.waited.values()) >= 0
        assert trace.first <= trace.last


def _of(node: IRNode, request: str) -> bool:
    return getattr(node, "request", None) == request


def chat(count: int, prompt: int = 64, answer: int = 8, shared: int = 0, **more: Any) -> IRGraph:
    """`count` requests of equal size; the first `shared` tokens are one prefill."""
    target = Target(**{"max_tokens": 128, "tiers": (Tier(DEVICE, 64),), **more})
    common = tuple(range(1000, 1000 + shared // 16))
    requests, nodes = [], list[IRNode]()
    for i in range(count):
        own = tuple(range(100 * i, 100 * i + (prompt - shared) // 16))
        requests.append(
            RequestDecl(f"r{i}", prompt_len=prompt, max_new_tokens=answer, blocks=common + own)
        )
        if shared and not nodes:
            nodes.append(Prefill("doc", "r0", 0, shared))
        before = ("doc",) if shared else ()
        nodes.append(Prefill(f"p{i}", f"r{i}", shared, prompt, operands=before))
        nodes.append(Decode(f"d{i}", f"r{i}", prompt, prompt + answer, operands=(f"p{i}",)))
    graph = IRGraph(target=target, requests=tuple(requests), nodes=tuple(nodes))
    verify(graph)
    return graph


def steps_of(graph: IRGraph, *names: str) -> list[int]:
    return [graph.by_name[name].step or 0 for name in names]


def test_larger_priority_then_earlier_deadline_goes_first() -> None:
    graph = chat(4, max_batch=1)
    urgent = [
        evolve(request, priority=priority, deadline=deadline)
        for request, priority, deadline in zip(
            graph.requests, (0, 0, 1, 0), (None, 9.0, None, 5.0), strict=True
        )
    ]
    result = Schedule().run(graph.replace(requests=tuple(urgent)), PassContext())
    p2, p3, p1, p0 = steps_of(result, "p2", "p3", "p1", "p0")
    assert p2 < p3 < p1 < p0


def test_requests_that_share_a_prefix_run_together() -> None:
    one, two = chat(2, shared=32), chat(2, shared=32)
    renamed = [
        node.replace(
            name=f"x{node.name}",
            request=f"x{getattr(node, 'request')}",  # noqa: B009
            operands=tuple(f"x{name}" for name in node.operands),
        )
        for node in two.nodes
    ]
    others = [
        evolve(request, id=f"x{request.id}", blocks=tuple(b + 5000 for b in request.blocks))
        for request in two.requests
    ]
    # written alternately, so that order of arrival would mix the groups
    requests = [r for pair in zip(one.requests, others, strict=True) for r in pair]
    nodes = [n for pair in zip(one.nodes, renamed, strict=True) for n in pair]
    target = evolve(one.target, max_batch=1)
    graph = one.replace(requests=tuple(requests), nodes=tuple(nodes), target=target)
    result = Schedule().run(graph, PassContext())
    first, second, third, fourth = steps_of(result, "p0", "p1", "xp0", "xp1")
    assert first < second < third < fourth


def test_arrivals_are_waited_for_only_when_asked() -> None:
    graph = chat(2, max_tokens=4096)
    late = (graph.requests[0], evolve(graph.requests[1], arrival=1e3))
    graph = graph.replace(requests=late)
    assert steps_of(Schedule().run(graph, PassContext()), "p1") == [0]
    waited = Schedule(arrivals=True).run(graph, PassContext())
    assert steps_of(waited, "p1")[0] > (waited.by_name["d0"].until or 0)  # type: ignore[attr-defined]
    timeline = simulate(flatten(graph), arrivals=True, fill=True)
    assert timeline.start[timeline.admitted[1]] >= 1e3


def test_decodes_never_stall_behind_a_long_prompt() -> None:
    graph = chat(2, prompt=480, answer=4, max_tokens=100)
    result = Schedule().run(graph, PassContext())
    decode = result.by_name["d0"]
    assert isinstance(decode, Decode)
    assert decode.until is not None
    assert decode.step is not None
    assert decode.until - decode.step + 1 == 3
    assert any(node.kind == "prefill" and node.step == decode.step for node in result.nodes)


def test_a_prefill_that_never_fits_names_the_remedy() -> None:
    graph = chat(1, prompt=480)
    with pytest.raises(SageIRError, match=r"%p0 prefills 480 tokens.*\n.*chunk-prefill"):
        Schedule(fill=False).run(graph, PassContext())


def test_a_request_that_never_fits_is_an_error() -> None:
    graph = chat(1, prompt=480, tiers=(Tier(DEVICE, 30),))
    with pytest.raises(SageIRError, match=r"@r0 needs 31 KV blocks .* has 30"):
        Schedule().run(graph, PassContext())


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"max_batch": 1}, Limit.BATCH),
        ({"tiers": (Tier(DEVICE, 5),)}, Limit.KV),
        ({"max_tokens": 64}, Limit.TOKENS),
    ],
)
def test_the_trace_says_why_a_request_waited(more: dict[str, Any], why: Limit) -> None:
    graph = chat(3, **more)
    first, second, third = Schedule().trace(graph)
    assert not first.waited
    assert set(second.waited) == {why}
    assert third.waited[Limit.PRIORITY] > 0
    after = graph.nodes[2].replace(after=("d0",))
    ordered = graph.replace(nodes=(*graph.nodes[:2], after, *graph.nodes[3:]))
    assert Schedule().trace(ordered)[1].waited[Limit.ORDER] > 0


def test_growth_is_linear() -> None:
    """Counted, not timed: steps, and so the work, grow with the requests."""
    counts = []
    for requests in (50, 200):
        ctx = PassContext()
        Schedule().run(chat(requests), ctx)
        counts.append(ctx.counts["steps"])
    assert counts[1] <= 4.5 * counts[0]
