"""MLIR's policy as properties: no valid graph makes a pass fail, and what comes out is valid."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import Decode, KVNode, Prefill
from sagellm_ir.passes.base import PassContext
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import PRESETS, Pipeline
from sagellm_ir.text import parse_graph, print_graph
from sagellm_ir.verify import check_capacity
from tests.strategies import graphs

built = graphs(stages=("built",))
thorough = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

PASSES = (
    "canonicalize",
    "prefix-dedup",
    "prefix-dedup{gated=false}",
    "prefix-dedup{gated=false, min_tokens=32}",
    "kv-reuse",
    "chunk-prefill{tokens=7}",
    "chunk-prefill{tokens=32}",
)
IDEMPOTENT = (*PASSES[:4], "chunk-prefill{tokens=32}")


def run(pipeline: str, graph: IRGraph, max_rewrites: int | None = None) -> IRGraph:
    return PassManager(Pipeline.parse(pipeline), max_rewrites=max_rewrites).run(graph)


@pytest.mark.parametrize("name", PASSES)
@thorough
@given(graph=built)
def test_a_pass_keeps_graphs_valid(name: str, graph: IRGraph) -> None:
    result = run(name, graph)
    text = print_graph(result)
    assert print_graph(parse_graph(text, "printed")) == text


@pytest.mark.parametrize("name", IDEMPOTENT)
@thorough
@given(graph=built)
def test_a_second_run_changes_nothing(name: str, graph: IRGraph) -> None:
    once = run(name, graph)
    assert print_graph(run(name, once)) == print_graph(once)


@thorough
@given(graph=built, names=st.lists(st.sampled_from(PASSES), max_size=4))
def test_passes_run_in_any_order(graph: IRGraph, names: list[str]) -> None:
    run(",".join(names), graph)


@pytest.mark.parametrize("name", PASSES)
@thorough
@given(graph=built, budget=st.integers(0, 4))
def test_any_number_of_rewrites_is_valid(name: str, graph: IRGraph, budget: int) -> None:
    result = run(name, graph, budget)
    if budget == 0:
        assert print_graph(result) == print_graph(graph)


@thorough
@given(graph=built, names=st.permutations(PASSES))
def test_order_edges_survive(graph: IRGraph, names: list[str]) -> None:
    """Whatever had to finish before a request's last prefill still does."""
    result = run(",".join(names[:3]), graph)
    before, after = _ends(graph), _ends(result)
    for request, decodes in before.items():
        assert decodes <= after[request]


def _ends(graph: IRGraph) -> dict[str, set[tuple[str, int]]]:
    """For each request, the answers that are complete before its prompt is."""
    prompts = {request.id: request.prompt_len for request in graph.requests}
    ends = {request.id: request.stop for request in graph.requests}
    done: dict[str, set[tuple[str, int]]] = {}
    found = {}
    for node in graph.nodes:
        done[node.name] = set().union(*(done[name] for name in (*node.operands, *node.after)))
        if isinstance(node, Decode) and node.stop == ends[node.request]:
            done[node.name].add((node.request, node.stop))
        if isinstance(node, Prefill) and node.stop == prompts[node.request]:
            found[node.request] = set(done[node.name])
    return found


@thorough
@given(graph=built)
def test_dedup_computes_no_more_than_before(graph: IRGraph) -> None:
    assert _computed(run("prefix-dedup{gated=false}", graph)) <= _computed(graph)


def _computed(graph: IRGraph) -> int:
    return sum(node.stop - node.start for node in graph.nodes if isinstance(node, Prefill))


@thorough
@given(graph=graphs(stages=("built",), shared=False))
def test_dedup_computes_each_shareable_block_once(graph: IRGraph) -> None:
    """After folding, a block is computed by one node, unless it ends a whole prompt."""
    result = run("canonicalize,prefix-dedup{gated=false}", graph)
    size = graph.target.block_size
    seen: set[int] = set()
    copied = {name for node in graph.nodes if node.kind == "kv_migrate" for name in node.operands}
    for node in result.nodes:
        if not isinstance(node, Prefill) or not isinstance(node, KVNode) or copied:
            continue
        asked = result.request[node.request]
        for k in range(-(-node.start // size), node.stop // size):
            if (k + 1) * size < asked.prompt_len:
                assert asked.blocks[k] not in seen, f"{node.name} computes block {k} again"
            seen.add(asked.blocks[k])


def test_a_pass_without_work_returns_its_input() -> None:
    graph = IRGraph()
    for item in Pipeline.parse(",".join(PASSES)):
        assert item.run(graph, PassContext()) is graph


@pytest.mark.parametrize("name", PRESETS)
@thorough
@given(graph=built)
def test_presets_schedule_any_built_graph(name: str, graph: IRGraph) -> None:
    result = run(name, graph)
    assert result.stage == "scheduled"
    check_capacity(result)
