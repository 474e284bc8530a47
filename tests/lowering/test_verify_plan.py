"""Each law of plans is checked, and a changed plan is caught unless the change does no harm."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from attrs import evolve
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.plan import (
    Bind,
    Collective,
    ExecutionPlan,
    KVFree,
    KVMove,
    LiveBlock,
    PlanStep,
    PrefillChunk,
    PrefixGroup,
    Resident,
)
from sagellm_ir.lowering.verify_plan import PlanError, verify_plan
from sagellm_ir.target import Target, Tier
from tests.lowering.plans import graphs
from tests.lowering.toy import scheduled

TARGET = Target(
    block_size=4, max_tokens=16, max_loops=4, tiers=(Tier("device", 16), Tier("host", 4))
)
PLAN = lower(
    scheduled(
        TARGET,
        [
            RequestDecl("r0", prompt_len=10, max_new_tokens=3, blocks=(0, 1)),
            RequestDecl("r1", prompt_len=9, max_new_tokens=5, blocks=(0, 1)),
        ],
    )
)
"""Step 0 prefills the shared document, step 1 both tails, steps 2 and 3 decode, step 4 frees."""


def with_step(at: int, plan: ExecutionPlan = PLAN, /, **changes: Any) -> ExecutionPlan:
    steps = list(plan.steps)
    steps[at] = evolve(steps[at], **changes)
    return evolve(plan, steps=tuple(steps))


def test_the_plan_is_legal() -> None:
    verify_plan(PLAN)
    assert [len(step.prefill) + len(step.decode) for step in PLAN.steps] == [1, 2, 2, 1, 0]


S1, S2, S3 = PLAN.steps[1:4]
BROKEN: dict[str, tuple[Callable[[], ExecutionPlan], str]] = {
    "version": (lambda: evolve(PLAN, version=7), "its version is 7"),
    "ids are unique": (
        lambda: evolve(PLAN, requests=PLAN.requests * 2),
        "two requests have one id",
    ),
    "tokens are the prompt": (
        lambda: evolve(PLAN, requests=(evolve(PLAN.requests[0], tokens=(1, 2)), PLAN.requests[1])),
        "has 2 tokens, not 10",
    ),
    "an id stands for some tokens": (
        lambda: evolve(
            PLAN, requests=tuple(evolve(r, tokens=(n,) * r.prompt_len) for n, r in enumerate(PLAN.requests))
        ),
        "block id 0 of 'r1' stands for other tokens",
    ),
    "steps count": (lambda: with_step(2, index=9), "step 2: its index is 9"),
    "workers exist": (lambda: with_step(0, worker="w9"), "the target has no worker 'w9'"),
    "tiers exist": (lambda: with_step(4, kv=(KVFree("devcie", (0,)),)), "did you mean 'device'"),
    "requests exist": (lambda: with_step(3, decode=("r9",)), "no request 'r9'"),
    "a prompt has no gap": (
        lambda: with_step(1, prefill=(PrefillChunk("r0", 9, 10), S1.prefill[1])),
        "reads token 8 of its KV, which is not written|filled up to 0",
    ),
    "a prompt is not computed twice": (
        lambda: with_step(1, prefill=(PrefillChunk("r0", 4, 10), S1.prefill[1])),
        "writes token 4 into block 1, which is filled up to 4",
    ),
    "a chunk is inside its prompt": (
        lambda: with_step(1, prefill=(PrefillChunk("r0", 8, 11), S1.prefill[1])),
        r"prefills \[8:11\) of a prompt of 10",
    ),
    "no token is missing": (lambda: with_step(3, loops=1), "end of plan: 'r1' has got 4 of 5"),
    "no token is too many": (lambda: with_step(3, loops=3), "by 3 tokens, and 2 are left"),
    "a request that ended has no rows": (
        lambda: with_step(3, decode=("r0", "r1")),
        "'r0' has got all its tokens already",
    ),
    "a prompt ends before its answer": (
        lambda: with_step(1, prefill=(S1.prefill[0],), groups=(), decode=("r1",)),
        "decodes 'r1', whose prompt has not ended",
    ),
    "a request has one row": (
        lambda: with_step(2, decode=("r0", "r0", "r1")),
        "two rows of one request",
    ),
    "nothing is read before it is written": (
        lambda: with_step(0, prefill=(PrefillChunk("r0", 0, 4),)),
        "reads token 4 of its KV, which is not written",
    ),
    "nothing is written while shared": (
        lambda: with_step(2, binds=(*S2.binds, Bind("r1", 2, (S1.binds[0].blocks[0],)))),
        "but it holds|shares it",
    ),
    "what is cached is not written": (
        lambda: evolve(
            with_step(0), resident=(Resident("device", (0,), (0,)),)
        ),
        "writes token 0 into block 0, which is filled up to 4 of 4",
    ),
    "nothing is used after its free": (
        lambda: with_step(3, kv=(*S3.kv, KVFree("device", (0,)))),
        "does not cover",
    ),
    "nothing is freed twice": (
        lambda: with_step(4, kv=(*S3.kv, *PLAN.steps[4].kv)),
        "frees block 2 of tier 'device', which is free",
    ),
    "nothing leaks": (lambda: with_step(4, kv=()), "end of plan: blocks 0, 1, .* are never freed"),
    "retained content is there": (
        lambda: evolve(PLAN, retained=(Resident("device", (5,), (5,)),)),
        "block 5 does not hold content 5",
    ),
    "blocks are in their tier": (
        lambda: with_step(0, binds=(Bind("r0", 0, (0, 16)),)),
        "block 16 is outside tier 'device' of 16 blocks",
    ),
    "residents are in their tier": (
        lambda: evolve(PLAN, resident=(Resident("host", (9,), (4,)),)),
        "block 4 is outside tier 'host'",
    ),
    "residents are held once": (
        lambda: evolve(PLAN, resident=(Resident("host", (9, 8), (1, 1)),)),
        "block 1 of tier 'host' is resident twice",
    ),
    "live blocks are of requests": (
        lambda: evolve(PLAN, live=(LiveBlock("r9", 0, 2),)),
        "cannot be the live one of 'r9'",
    ),
    "moves copy what is there": (
        lambda: with_step(2, kv=(KVMove("device", "host", (9,), (0,)),)),
        "moves block 9 of tier 'device', which is free",
    ),
    "moves overwrite nothing": (
        lambda: with_step(2, kv=(KVMove("device", "host", (0, 1), (0, 0)),)),
        "moves onto block 0 of tier 'host', which is held",
    ),
    "moves change the place": (
        lambda: with_step(2, kv=(KVMove("device", "device", (0,), (9,)),)),
        "moves blocks within tier 'device'",
    ),
    "moves have as many targets": (
        lambda: with_step(2, kv=(KVMove("device", "host", (0, 1), (0,)),)),
        "moves 2 blocks to 1",
    ),
    "tables have no holes": (
        lambda: with_step(1, binds=(Bind("r0", 3, (2,)), S1.binds[1])),
        "binds 'r0' from block 3 of 2 on",
    ),
    "tables cover their rows": (lambda: with_step(2, binds=S2.binds[:1]), "'r1' does not cover"),
    "content is what the table says": (
        lambda: with_step(1, binds=(S1.binds[0], Bind("r1", 0, (1, 0, 3)))),
        "binds block 1 as block 0 of 'r1', but it holds 1",
    ),
    "loops fit the target": (lambda: with_step(2, loops=5), "5 forwards, and 1 to 4 are legal"),
    "a prefill has one forward": (lambda: with_step(0, loops=2), "2 forwards, and 1 to 1"),
    "the batch fits": (
        lambda: evolve(PLAN, target=evolve(TARGET, max_batch=1)),
        "2 rows, and the target's batch is 1",
    ),
    "the tokens fit": (
        lambda: evolve(PLAN, target=evolve(TARGET, max_tokens=7)),
        "8 tokens, and the target's budget is 7",
    ),
    "a target that does not mix": (
        lambda: evolve(
            with_step(1, prefill=(S1.prefill[1],), decode=("r0",)), target=evolve(TARGET, mixed=False)
        ),
        "which the target does not mix",
    ),
    "costs are numbers": (lambda: with_step(2, cost=float("nan")), "a cost of nan"),
    "collectives have rows": (
        lambda: with_step(4, collectives=(Collective("tp", 8, 1),)),
        "a collective of 8 bytes",
    ),
    "groups have members": (
        lambda: with_step(2, groups=(PrefixGroup(0, 8, ("r0",)),)),
        r"group \[0:8\) of 1 rows",
    ),
    "members are rows": (
        lambda: with_step(2, groups=(PrefixGroup(0, 8, ("r0", "r9")),)),
        "holds 'r9', which is no row",
    ),
    "groups end before what is written": (
        lambda: with_step(1, groups=(PrefixGroup(0, 12, ("r0", "r1")),)),
        "reaches into what 'r0' writes, from 8 on",
    ),
    "tables of a group agree": (
        lambda: with_step(2, groups=(PrefixGroup(0, 9, ("r0", "r1")),)),
        "tables of group .* differ",
    ),
    "groups nest": (
        lambda: with_step(2, groups=(PrefixGroup(4, 8, ("r0", "r1")),)),
        "nests in no group",
    ),
    "groups do not overlap": (
        lambda: with_step(2, groups=(S2.groups[0], PrefixGroup(0, 4, ("r0", "r1")))),
        "overlaps another group",
    ),
}  # fmt: skip


@pytest.mark.parametrize("law", BROKEN)
def test_a_broken_law_is_named(law: str) -> None:
    broken, message = BROKEN[law]
    with pytest.raises(PlanError, match=message):
        verify_plan(broken())


def test_findings_are_collected_up_to_a_limit() -> None:
    many = evolve(PLAN, steps=tuple(evolve(PLAN.steps[2], index=99) for _ in range(60)))
    with pytest.raises(PlanError) as caught:
        verify_plan(many)
    assert len(caught.value.diagnostics) == 20


def _drop(items: tuple[object, ...], at: int) -> tuple[object, ...]:
    return items[:at] + items[at + 1 :]


def _twice(items: tuple[object, ...], at: int) -> tuple[object, ...]:
    return (*items[:at], items[at], *items[at:])


FIELDS = ("kv", "binds", "prefill", "decode")


@given(st.data())
@settings(deadline=None)
def test_nothing_can_be_dropped_or_doubled(data: st.DataObject) -> None:
    """What a step does is needed, once.

    Harmless, and so allowed: doing a bind twice.
    """
    graph = data.draw(graphs())
    assume(_all_needed(graph))
    plan = lower(graph)
    places = [
        (index, name, at)
        for index, step in enumerate(plan.steps)
        for name in FIELDS
        for at in range(len(getattr(step, name)))
    ]
    index, name, at = data.draw(st.sampled_from(places))
    change = data.draw(st.sampled_from((_drop, _twice)))
    assume(not (change is _twice and name == "binds"))
    changed = with_step(index, plan, **{name: change(getattr(plan.steps[index], name), at)})
    used = plan.steps[index]
    if change is _drop and name == "binds":
        # A table may be longer than its rows need: the block after the last written token.
        bind = used.binds[at]
        row = bind.request in (*used.decode, *(chunk.request for chunk in used.prefill))
        assume(row and not _beyond(plan, bind))
    with pytest.raises(PlanError):
        verify_plan(changed)


def _all_needed(graph: IRGraph) -> bool:
    """Whether every node answers or has users: nobody misses what a dead node does."""
    c = graph.columns
    needed = c.is_decode | (c.is_prefill & (c.stop == c.prompt[c.request]))
    needed[c.operands.target] = True
    return bool(needed.all())


def _beyond(plan: ExecutionPlan, bind: Bind) -> bool:
    """Whether a bind only adds blocks that the request never writes."""
    request = next(r for r in plan.requests if r.id == bind.request)
    written = request.prompt_len + request.max_new_tokens - 1
    return bind.at * plan.target.block_size >= written


@given(st.data())
@settings(deadline=None)
def test_no_two_steps_with_rows_can_change_places(data: st.DataObject) -> None:
    """Where a request computes its prompt in one of them and has a row in the other."""
    plan = lower(data.draw(graphs()))
    pairs = [
        at
        for at, (one, two) in enumerate(pairwise(plan.steps))
        if _rows(one) & _prompts(two) or _prompts(one) & _rows(two)
    ]
    assume(pairs)
    at = data.draw(st.sampled_from(pairs))
    changed = list(plan.steps)
    changed[at] = evolve(plan.steps[at + 1], index=at)
    changed[at + 1] = evolve(plan.steps[at], index=at + 1)
    with pytest.raises(PlanError):
        verify_plan(evolve(plan, steps=tuple(changed)))


def _prompts(step: PlanStep) -> set[str]:
    return {chunk.request for chunk in step.prefill}


def _rows(step: PlanStep) -> set[str]:
    return {*step.decode, *_prompts(step)}


@given(st.data())
@settings(deadline=None)
def test_no_block_of_a_plan_can_be_another(data: st.DataObject) -> None:
    """Each number of a bind or a free matters; a fresh block that nobody else uses is harmless."""
    plan = lower(data.draw(graphs()))
    places = [
        (index, name, at, i)
        for index, step in enumerate(plan.steps)
        for name in ("kv", "binds")
        for at, item in enumerate(getattr(step, name))
        for i in range(len(item.blocks))
    ]
    index, name, at, i = data.draw(st.sampled_from(places))
    items = list(getattr(plan.steps[index], name))
    blocks = list(items[at].blocks)
    blocks[i] += data.draw(st.sampled_from((-1, 1, 1000)))
    items[at] = evolve(items[at], blocks=tuple(blocks))
    with pytest.raises(PlanError):
        verify_plan(with_step(index, plan, **{name: tuple(items)}))
