"""Lowering: what a plan says, and that it is legal, deterministic and minimal."""

from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.allocator import BlockPool
from sagellm_ir.lowering.lower import lower_steps
from sagellm_ir.lowering.plan import (
    Bind,
    ExecutionPlan,
    KVFree,
    KVMove,
    PrefillChunk,
    PrefixGroup,
    Resident,
)
from sagellm_ir.lowering.verify_plan import verify_plan
from sagellm_ir.nodes import AllReduce, Decode, IRNode, KVFetch, KVMigrate, Prefill
from sagellm_ir.target import Target, Tier, Worker
from tests.lowering.plans import graphs

TARGET = Target(block_size=4, tiers=(Tier("device", 16), Tier("host", 16)))


def graph(
    nodes: Iterable[IRNode],
    loops: tuple[int, ...],
    requests: Iterable[RequestDecl],
    target: Target = TARGET,
    cache: tuple[CachedBlocks, ...] = (),
) -> IRGraph:
    return IRGraph("g", target, tuple(requests), tuple(nodes), cache, "scheduled", loops)


def shared() -> IRGraph:
    """Two requests behind one document of two blocks."""
    return graph(
        [
            Prefill("doc", "r0", 0, 8, step=0),
            Prefill("p0", "r0", 8, 10, operands=("doc",), step=1),
            Prefill("p1", "r1", 8, 9, operands=("doc",), step=1),
            Decode("d0", "r0", 10, 13, operands=("p0",), step=2, until=2),
            Decode("d1", "r1", 9, 14, operands=("p1",), step=2, until=3),
        ],
        (1, 1, 2, 2),
        [
            RequestDecl("r0", prompt_len=10, max_new_tokens=3, blocks=(0, 1)),
            RequestDecl("r1", prompt_len=9, max_new_tokens=5, blocks=(0, 1)),
        ],
    )


def test_a_shared_prefix_is_bound_not_copied() -> None:
    plan = lower(shared())
    verify_plan(plan)
    first, second, third, fourth, last = plan.steps
    assert first.binds == (Bind("r0", 0, (0, 1)),)
    assert first.prefill == (PrefillChunk("r0", 0, 8),)
    assert second.binds == (Bind("r0", 2, (2,)), Bind("r1", 0, (0, 1, 3)))
    assert second.prefill == (PrefillChunk("r0", 8, 10), PrefillChunk("r1", 8, 9))
    assert second.groups == (PrefixGroup(0, 8, ("r0", "r1")),)
    assert third.decode == ("r0", "r1")
    assert third.binds == (Bind("r0", 3, (4,)), Bind("r1", 3, (5,)))
    assert third.groups == second.groups
    assert fourth.kv == (KVFree("device", (2, 4)),)
    assert (fourth.decode, fourth.loops, fourth.groups) == (("r1",), 2, ())
    assert last.kv == (KVFree("device", (0, 1, 3, 5)),)
    assert not last.decode
    assert last.cost == 0


def test_tokens_join_by_request_id() -> None:
    plan = lower(shared(), {"r0": range(10)})
    assert plan.requests[0].tokens == tuple(range(10))
    assert plan.requests[1].tokens is None


def test_a_spill_and_a_reload_rebind_the_table() -> None:
    plan = lower(
        graph(
            [
                Prefill("p", "r", 0, 6, step=0),
                Decode("d", "r", 6, 8, operands=("p",), step=1, until=1),
                KVMigrate("h", "r", 0, 6, operands=("p",), step=2),
                Prefill("q", "s", 0, 60, step=3),
                Decode("e", "s", 60, 61, operands=("q",), step=3, until=3),
                KVFetch("f", "r", 0, 6, operands=("h",), step=4),
                Decode("d.1", "r", 8, 9, operands=("f",), step=4, until=4),
            ],
            (1, 1, 1, 1, 1),
            [
                RequestDecl("r", prompt_len=6, max_new_tokens=3, blocks=(0,)),
                RequestDecl("s", prompt_len=60, max_new_tokens=1, blocks=tuple(range(1, 16))),
            ],
        )
    )
    verify_plan(plan)
    assert plan.steps[2].kv == (KVMove("device", "host", (0, 1), (0, 1), node="h"),)
    assert plan.steps[3].kv == (KVFree("device", (0, 1)),)
    assert plan.steps[4].kv == (
        KVFree("device", tuple(range(15))),
        KVMove("host", "device", (0, 1), (0, 1), node="f"),
    )
    assert plan.steps[4].binds == (Bind("r", 0, (0, 1, 2)),)


def test_a_dropped_prefix_is_recomputed_by_a_request_that_needs_it() -> None:
    plan = lower(
        graph(
            [
                Prefill("doc", "r0", 0, 4, step=0),
                Prefill("p0", "r0", 4, 5, operands=("doc",), step=1),
                Decode("d0", "r0", 5, 6, operands=("p0",), step=1, until=1),
                Prefill("doc.1", "r0", 0, 4, step=2),
                Prefill("p1", "r1", 4, 5, operands=("doc.1",), step=3),
                Decode("d1", "r1", 5, 6, operands=("p1",), step=3, until=3),
            ],
            (1, 1, 1, 1),
            [
                RequestDecl("r0", prompt_len=5, max_new_tokens=1, blocks=(0,)),
                RequestDecl("r1", prompt_len=5, max_new_tokens=1, blocks=(0,)),
            ],
        )
    )
    verify_plan(plan)
    assert plan.steps[2].prefill == (PrefillChunk("r1", 0, 4),)


def cached(blocks: int, retain: bool = False) -> ExecutionPlan:
    """One request that hits two cached blocks on the device and one on the host."""
    return lower(
        graph(
            [
                KVFetch("hit", "r", 0, 8, src="device", step=0),
                KVFetch("back", "r", 8, 12, operands=("hit",), step=0),
                Prefill("p", "r", 12, 17, operands=("back",), step=0),
                Decode("d", "r", 17, 18, operands=("p",), step=0, until=0),
                Prefill("q", "s", 0, 13, step=1),
                Decode("e", "s", 13, 14, operands=("q",), step=1, until=1),
            ],
            (1, 1),
            [
                RequestDecl("r", prompt_len=17, max_new_tokens=1, blocks=(7, 8, 9, 10)),
                RequestDecl("s", prompt_len=13, max_new_tokens=1, blocks=(20, 21, 22)),
            ],
            target=Target(block_size=4, tiers=(Tier("device", blocks), Tier("host", 4))),
            cache=(CachedBlocks("device", blocks=(5, 7, 8)), CachedBlocks("host", blocks=(9,))),
        ),
        retain=retain,
    )


def test_cached_blocks_are_bound_where_they_are() -> None:
    plan = cached(blocks=16)
    verify_plan(plan)
    assert plan.resident == (
        Resident("device", (5, 7, 8), (0, 1, 2)),
        Resident("host", (9,), (0,)),
    )
    assert plan.steps[0].kv == (KVMove("host", "device", (0,), (3,), node="back"),)
    assert plan.steps[0].binds == (Bind("r", 0, (1, 2, 3, 4, 5)),)
    assert {ids for held in plan.retained for ids in held.ids} == {5, 7, 8, 9}


def test_idle_cache_gives_way_least_recently_used_first() -> None:
    plan = cached(blocks=5)
    verify_plan(plan)
    assert plan.steps[0].kv[0] == KVFree("device", (0,))
    assert plan.steps[1].kv == (KVFree("device", (0, 2, 3, 4)),)
    assert {ids for held in plan.retained for ids in held.ids} == {7, 9}


def test_retain_keeps_dead_prompts_until_their_space_is_needed() -> None:
    ample = cached(blocks=16, retain=True)
    verify_plan(ample)
    assert {ids for held in ample.retained for ids in held.ids} == {5, 7, 8, 9, 10, 20, 21, 22}
    tight = cached(blocks=6, retain=True)
    verify_plan(tight)
    assert {20, 21, 22} <= {ids for held in tight.retained for ids in held.ids}


def test_two_workers_hand_kv_over() -> None:
    target = Target(
        block_size=4,
        tiers=(Tier("device", 8),),
        workers=(Worker("pre", "prefill"), Worker("dec", "decode")),
    )
    plan = lower(
        graph(
            [
                Prefill("p", "r", 0, 6, step=0, worker="pre"),
                KVMigrate("m", "r", 0, 6, operands=("p",), to="device", step=1, worker="dec"),
                Decode("d", "r", 6, 9, operands=("m",), step=1, until=2, worker="dec"),
            ],
            (1, 1, 1),
            [RequestDecl("r", prompt_len=6, max_new_tokens=3, blocks=(0,))],
            target=target,
        )
    )
    verify_plan(plan)
    assert [step.worker for step in plan.steps] == ["pre", "dec", "dec", "dec"]
    assert plan.steps[1].kv == (KVMove("device", "device", (0, 1), (0, 1), "pre", "m"),)
    assert plan.steps[1].binds == (Bind("r", 0, (0, 1, 2)),)
    assert plan.steps[2].kv == (KVFree("device", (0, 1), "pre"),)


def test_collectives_last_as_long_as_their_rows() -> None:
    plan = lower(
        graph(
            [
                Prefill("p", "r", 0, 4, step=0),
                AllReduce("a", operands=("p",), bytes=64, calls=2, step=0),
                Decode("d", "r", 4, 7, operands=("p",), step=1, until=2),
                AllReduce("b", operands=("d",), bytes=16, calls=2, step=1),
            ],
            (1, 1, 1),
            [RequestDecl("r", prompt_len=4, max_new_tokens=3, blocks=(0,))],
        )
    )
    verify_plan(plan)
    assert [[reduce.bytes for reduce in step.collectives] for step in plan.steps] == [
        [64],
        [16],
        [16],
        [],
    ]


def test_chunks_of_one_step_may_build_on_each_other() -> None:
    """Each layer writes the KV of all rows before attention reads it."""
    nodes = [node.replace(step=0) if node.name[0] in "dp" else node for node in shared().nodes]
    nodes = [
        node.replace(step=1, until=1 + (node.name == "d1")) if isinstance(node, Decode) else node
        for node in nodes
    ]
    plan = lower(shared().replace(nodes=tuple(nodes), loops=(1, 2, 2)))
    verify_plan(plan)
    assert plan.steps[0].prefill == (PrefillChunk("r0", 0, 10), PrefillChunk("r1", 8, 9))


def test_a_step_without_forwards_has_no_rows() -> None:
    nodes = [
        node.replace(until=node.until + 1) if isinstance(node, Decode) and node.until else node
        for node in shared().nodes
    ]
    moved = KVMigrate("h", "r0", 0, 8, operands=("doc",), step=2)
    nodes = [node.replace(step=3) if isinstance(node, Decode) else node for node in nodes]
    nodes = [*nodes[:3], moved, *nodes[3:]]
    plan = lower(shared().replace(nodes=tuple(nodes), loops=(1, 1, 0, 2, 2)))
    verify_plan(plan)
    assert (plan.steps[2].loops, plan.steps[2].decode, plan.steps[2].groups) == (0, (), ())


def test_only_a_scheduled_graph_is_lowered() -> None:
    with pytest.raises(SageIRError, match=r"is built(.|\n)*'schedule'"):
        lower(shared().replace(stage="built"))


def test_a_full_tier_names_evict() -> None:
    tight = Target(block_size=4, tiers=(Tier("device", 5),))
    with pytest.raises(SageIRError, match=r"step 2, %d1 needs 1 blocks(.|\n)*'evict'"):
        lower(shared().replace(target=tight))


def test_a_fetch_of_what_no_cache_holds_is_refused() -> None:
    requests = [RequestDecl("r", prompt_len=5, max_new_tokens=1, blocks=(3,))]
    with pytest.raises(SageIRError, match="lacks block 3, which %f fetches"):
        lower(graph([KVFetch("f", "r", 0, 4, src="device", step=0)], (1,), requests))


@given(graphs())
@settings(deadline=None)
def test_every_plan_is_legal_and_repeatable(scheduled: IRGraph) -> None:
    plan = lower(scheduled)
    verify_plan(plan)
    assert plan == lower(scheduled)
    assert plan.steps == tuple(lower_steps(scheduled))
    verify_plan(lower(scheduled, retain=True))


@given(graphs())
@settings(deadline=None)
def test_groups_are_what_the_tables_share(scheduled: IRGraph) -> None:
    """Every two rows of a step share exactly the blocks that their common groups say."""
    size, tables = scheduled.target.block_size, dict[str, list[int]]()
    for step in lower(scheduled).steps:
        for bind in step.binds:
            tables.setdefault(bind.request, [])[bind.at :] = bind.blocks
        starts = {chunk.request: chunk.start for chunk in step.prefill}
        rows = [*starts, *step.decode]
        for place, one in enumerate(rows):
            for other in rows[place + 1 :]:
                common = 0
                limit = min(starts.get(one, 1 << 30), starts.get(other, 1 << 30)) // size
                for mine, yours in zip(tables[one][:limit], tables[other], strict=False):
                    if mine != yours:
                        break
                    common += size
                told = [g.stop for g in step.groups if {one, other} <= set(g.requests)]
                assert max(told, default=0) == common


def test_blocks_come_in_order_and_used_ones_first() -> None:
    pool = BlockPool(10)
    assert (pool.take(3), pool.take(3), pool.take(0)) == ((0, 1, 2), (3, 4, 5), ())
    pool.free((3, 5))
    pool.free((0, 1))
    assert pool.take(2) == (0, 1)
    assert pool.take(3) == (6, 7, 8)
    assert pool.take(4) is None
    assert pool.free_blocks == 3
    assert pool.take(3) == (3, 5, 9)
    assert pool.take(1) is None


def test_reserved_blocks_are_not_handed_out() -> None:
    pool = BlockPool(6)
    pool.reserve((1, 4))
    assert pool.free_blocks == 4
    assert pool.take(4) == (0, 2, 3, 5)


@pytest.mark.parametrize("blocks", [(1,), (2, 2), (6,), (-1,)])
def test_only_free_blocks_can_be_reserved(blocks: tuple[int, ...]) -> None:
    pool = BlockPool(6)
    pool.reserve((1, 4))
    with pytest.raises(ValueError, match="outside the tier, or reserved twice"):
        pool.reserve(blocks)


@given(st.integers(0, 40), st.lists(st.integers(0, 12)), st.randoms())
def test_no_block_is_handed_out_twice(capacity: int, counts: list[int], random: Random) -> None:
    pool = BlockPool(capacity)
    held: list[tuple[int, ...]] = []
    free = capacity
    for count in counts:
        taken = pool.take(count)
        assert (taken is None) == (count > free)
        if taken is None:
            if held:
                held.sort(key=lambda _: random.random())
                free += len(held[-1])
                pool.free(held.pop())
        else:
            assert len(taken) == count
            assert list(taken) == sorted(taken)
            held.append(taken)
            free -= count
        used = [block for blocks in held for block in blocks]
        assert len(set(used)) == len(used)
        assert set(used) <= set(range(capacity))
        assert pool.free_blocks == free
