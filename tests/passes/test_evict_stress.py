"""`evict` where it has much to do: shared documents, urgent requests in between, little room."""

from attrs import evolve
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.verify_plan import verify_plan
from sagellm_ir.nodes import Decode, IRNode, Prefill, collective
from sagellm_ir.passes.base import PassContext
from sagellm_ir.passes.evict import Evict
from sagellm_ir.passes.kv_policy import POLICIES
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.target import DEVICE, HOST, Target, Tier, Worker
from sagellm_ir.verify import check_capacity, verify

SPLITS = (("general",), ("general", "general"), ("prefill", "decode"))


@st.composite
def targets(draw: st.DrawFn) -> Target:
    """Small budgets, and a host that takes everything, a little, or nothing."""
    size = draw(st.sampled_from((1, 4, 16)))
    roles = draw(st.sampled_from((SPLITS[0], *SPLITS)))
    host = Tier(
        HOST, draw(st.sampled_from((8, 24, 1000))), bandwidth=draw(st.sampled_from((1e5, 1e12)))
    )
    return Target(
        block_size=size,
        max_tokens=draw(st.sampled_from((max(size, 8), 3 * size + 5, 512))),
        max_batch=draw(st.integers(1, 3)),
        max_loops=draw(st.sampled_from((1, 4, 16))),
        mixed=draw(st.booleans()),
        tp=draw(st.sampled_from((1, 1, 2))),
        tiers=(Tier(DEVICE, 4096), host),
        workers=tuple(Worker(f"w{i}", role) for i, role in enumerate(roles)),
    )


@st.composite
def crowds(draw: st.DrawFn) -> IRGraph:
    """Requests over a tree of documents, in an order that makes documents wait."""
    target = draw(targets())
    size, fresh = target.block_size, iter(range(10_000))
    documents: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, 4))):
        base, count = draw(st.sampled_from(documents)), draw(st.integers(1, 4))
        documents.append((*base, *(next(fresh) for _ in range(count))))
    requests, nodes = [], list[IRNode]()
    for i in range(draw(st.integers(4, 14))):
        own = draw(st.integers(0, 2))
        blocks = (*draw(st.sampled_from(documents)), *(next(fresh) for _ in range(own)))
        tail = draw(st.integers(1, size - 1)) if size > 1 else 0
        blocks = blocks if blocks or tail else (next(fresh),)
        request = RequestDecl(
            f"r{i}",
            prompt_len=len(blocks) * size + tail,
            blocks=blocks,
            max_new_tokens=draw(st.integers(1, 12)),
            priority=draw(st.integers(0, 3)),
        )
        requests.append(request)
        made = Prefill(f"p{i}", request.id, 0, request.prompt_len)
        answer = Decode(f"d{i}", request.id, made.stop, request.stop, operands=(made.name,))
        for node in (made, answer):
            nodes.append(node)
            if target.tp > 1:
                nodes.append(collective(node, target, f"{node.name}.sum"))
    held = draw(st.sampled_from(documents)) if draw(st.booleans()) else ()
    tier = draw(st.sampled_from((DEVICE, HOST)))
    cache = (CachedBlocks(tier, blocks=held),) if held and len(held) <= 8 else ()
    return IRGraph(target=target, requests=tuple(requests), nodes=tuple(nodes), cache=cache)


def peak(graph: IRGraph) -> int:
    """The most device blocks that a worker needs in a step, by bisection of the law."""
    low, high = 0, 4096
    while low < high:
        middle = (low + high) // 2
        try:
            check_capacity(shrunk(graph, middle))
            high = middle
        except SageIRError:
            low = middle + 1
    return low


def shrunk(graph: IRGraph, blocks: int) -> IRGraph:
    tiers = (Tier(DEVICE, blocks), *graph.target.tiers[1:])
    return graph.replace(target=evolve(graph.target, tiers=tiers))


@settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(
    crowds(),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(("auto", "always", "never")),
)
def test_every_step_down_fits_and_lowers(graph: IRGraph, policy: str, spill: str) -> None:
    verify(graph)
    stages = "prefix-dedup,kv-reuse,chunk-prefill,schedule"
    if len(graph.target.workers) > 1:
        stages = stages.replace("schedule", "disaggregate,schedule")
    scheduled = run(stages, graph)
    steps_down = 0
    for blocks in range(peak(scheduled) - 1, 0, -1):
        try:
            fitting = Evict(policy, spill).run(shrunk(scheduled, blocks), PassContext())
        except SageIRError:
            break  # what runs at once, or cannot be dropped, is more than that
        steps_down += 1
        verify(fitting)
        check_capacity(fitting)
        fused = run("comm-fusion", fitting)
        check_capacity(fused)
        verify_plan(lower(fused))
    assume(steps_down)


def run(stages: str, graph: IRGraph) -> IRGraph:
    """What a pipeline makes of a graph, verified."""
    result = PassManager(Pipeline.parse(stages)).run(graph)
    verify(result)
    return result
