"""Properties of `comm-fusion`: each forward sums each of its rows once, and as much as before."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode
from sagellm_ir.passes.base import PassContext
from sagellm_ir.passes.comm_fusion import CommFusion
from sagellm_ir.verify import verify
from sagellm_ir.verify.schedule import step_workers
from tests.strategies import graphs

thorough = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
tensor_parallel = graphs(stages=("scheduled",)).filter(lambda graph: graph.target.tp > 1)


def lasts(node: IRNode) -> int:
    last = node.until if isinstance(node, Decode) else node.step
    assert last is not None
    return last


def rows(graph: IRGraph, step: int) -> set[str]:
    """Nodes that have a row in the forwards of a step."""
    found = set()
    owner = graph.target.workers[int(step_workers(graph.columns)[step])].name
    for node in graph.nodes:
        if (node.worker or graph.target.workers[0].name) != owner:
            continue
        if isinstance(node, Decode):
            prompt = graph.request[node.request].prompt_len
            if node.stop - node.start == (node.start == prompt) or not graph.decode_loops[step]:
                continue
        elif node.kind != "prefill":
            continue
        if (node.step or 0) <= step <= lasts(node):
            found.add(node.name)
    return found


def standing(graph: IRGraph, step: int) -> dict[str, AllReduce]:
    """By row of a step, the collective that sums it: the latest one that names it."""
    sums = [node for node in graph.nodes if isinstance(node, AllReduce)]
    running = rows(graph, step)
    found: dict[str, AllReduce] = {}
    for node in sorted(sums, key=lambda node: node.step or 0):
        if (node.step or 0) <= step:
            found.update({name: node for name in node.operands if name in running})
    return found


@thorough
@given(tensor_parallel, st.sampled_from((0, 1, 5000, 20000)), st.booleans())
def test_each_row_is_summed_once(graph: IRGraph, bucket_bytes: int, fuse_norm: bool) -> None:
    fused = CommFusion(bucket_bytes, fuse_norm).run(graph, PassContext())
    verify(fused)
    for step in range(len(graph.loops)):
        before, after = standing(graph, step), standing(fused, step)
        assert before.keys() == after.keys() == rows(graph, step)
        now = {node.name: node for node in after.values()}.values()
        assert sorted(name for node in now for name in node.operands) == sorted(after)
        assert sum(node.bytes for node in now) == sum(node.bytes for node in before.values())
        for node in now:
            assert node.fused == ("residual-norm" if fuse_norm else None)
            if bucket_bytes and len(node.operands) > 1:
                assert node.bytes <= bucket_bytes
        if not bucket_bytes:
            assert len(now) == bool(after)


@thorough
@given(tensor_parallel, st.sampled_from((0, 5000)))
def test_a_second_run_changes_nothing(graph: IRGraph, bucket_bytes: int) -> None:
    once = CommFusion(bucket_bytes).run(graph, PassContext())
    again = CommFusion(bucket_bytes).run(once, PassContext())
    keys = [
        sorted((n.step, n.operands, n.bytes, n.calls) for n in g.nodes if isinstance(n, AllReduce))
        for g in (once, again)
    ]
    assert keys[0] == keys[1]
    assert again is once
