"""Each wrong input gets one clear error, before anything is overwritten."""

from typing import Any

import pytest
from attrs import evolve

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import (
    Bind,
    ExecutionPlan,
    KVFree,
    KVMove,
    PlanRequest,
    PlanStep,
    PrefillChunk,
    PrefixGroup,
)
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine
from sagellm_ir.target import Target, Tier
from tests.embedded.tiny import blocks_of, decode, oracle, prefill, prompt, request, run

A = prompt(10, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request("b", (), 1), "no prompt tokens"),
        (PlanRequest("b", prompt_len=3), "no prompt tokens"),
        (PlanRequest("b", prompt_len=3, tokens=(1, 2)), "3 prompt positions"),
        (request("b", (1, 999), 1), "token 999; the vocabulary ends at 198"),
        (request("b", prompt(300), 1), "300 tokens, longer than the whole KV pool"),
        (request("b", prompt(200), 400), "may grow to 600 tokens; the model's limit is 512"),
        (evolve(request("b", A, 1), adapter="x"), "adapter 'x'"),
        (request("a", A, 1), "running already"),
    ],
)
def test_requests(engine: EmbeddedEngine, wrong: PlanRequest, message: str) -> None:
    engine.submit(request("a", A, 4))
    with pytest.raises(SageIRError, match=message):
        engine.submit(wrong)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-1), "temperature is -1"),
        (Sampling(top_p=0), "top_p is 0"),
        (Sampling(top_k=-2), "top_k is -2"),
        (Sampling(stop=("x",)), "the model has no tokenizer"),
    ],
)
def test_sampling(engine: EmbeddedEngine, sampling: Sampling, message: str) -> None:
    with pytest.raises(SageIRError, match=message):
        engine.submit(request("a", A, 1), sampling)


def step(**fields: Any) -> PlanStep:
    """A step 0 with some fields."""
    return evolve(PlanStep(0), **fields)


TABLE = Bind("a", 0, blocks_of(14, 0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (step(worker="w9"), "worker 'w9'; known: w0, w1"),
        (step(binds=(Bind("a", 0, (64,)),)), "block 64 of tier 'device', which has 64"),
        (step(binds=(Bind("a", 0, (-1,)),)), "tier 'device'"),
        (step(binds=(Bind("a", 1, (1,)),)), "a table has no holes"),
        (step(kv=(KVFree("disk", (1,)),)), "tier 'disk'"),
        (step(kv=(KVMove("device", "host", (1,), (32,)),)), "block 32 of tier 'host'"),
        (step(kv=(KVMove("host", "device", (40,), (1,)),)), "block 40 of tier 'host'"),
        (step(kv=(KVMove("device", "host", (1, 2), (3,)),)), "2 blocks names 1 destinations"),
        (step(prefill=(PrefillChunk("x", 0, 1),)), "'x', which was never submitted"),
        (step(decode=("x",)), "'x', which was never submitted"),
        (step(prefill=(PrefillChunk("a", 0, 4),)), "hold 0"),
        (step(binds=(TABLE,), prefill=(PrefillChunk("a", 0, 11),)), "which has 10"),
        (step(binds=(TABLE,), prefill=(PrefillChunk("a", 4, 4),)), "which has 10"),
    ],
)
def test_steps(model: CausalLM, engine: EmbeddedEngine, wrong: PlanStep, message: str) -> None:
    engine.submit(request("a", A, 4))
    with pytest.raises(SageIRError, match=message):
        engine.step(wrong)
    events = run(engine, prefill("a", len(A), TABLE.blocks), decode("a", loops=3))
    assert [e.token for e in events] == oracle(model, A, 4)


def test_a_row_past_its_table(engine: EmbeddedEngine) -> None:
    engine.submit(request("a", A, 4))
    run(engine, prefill("a", len(A), blocks_of(12, 0)))
    with pytest.raises(SageIRError, match="up to token 13, but its blocks on worker 'w0' hold 12"):
        run(engine, decode("a", loops=3))


def test_a_group_of_different_blocks(engine: EmbeddedEngine) -> None:
    for name, first in (("a", 0), ("b", 20)):
        engine.submit(request(name, A, 4))
        run(engine, prefill(name, len(A), blocks_of(14, first)))
    group = PrefixGroup(0, 8, ("a", "b"))
    with pytest.raises(SageIRError, match="do not hold the same blocks"):
        engine.step(PlanStep(3, decode=("a", "b"), groups=(group,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": Target().model}, "another model, dtype or KV schema"),
        ({"tp": 2}, "2 tensor-parallel ranks"),
        ({"tiers": (Tier("host", 4),)}, "no tier 'device'"),
    ],
)
def test_targets(model: CausalLM, target: Target, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SageIRError, match=message):
        EmbeddedEngine(model, evolve(target, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 8}, "blocks of 8 tokens, the engine's have 4"),
        ({"tiers": (Tier("device", 99),)}, "99 blocks in tier 'device'; the engine has 64"),
        ({"tiers": (Tier("device", 4), Tier("disk", 9))}, "no such tier"),
        ({"model": Target().model}, "another model, dtype or KV schema"),
    ],
)
def test_plans_for_another_target(
    engine: EmbeddedEngine, target: Target, change: dict[str, Any], message: str
) -> None:
    plan = ExecutionPlan("p", evolve(target, **change), (), ())
    with pytest.raises(SageIRError, match=message):
        list(engine.execute(plan))
