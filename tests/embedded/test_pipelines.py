"""Compiled plans of every preset and policy: tokens equal plain greedy decoding."""

import random

import pytest

from sagellm_ir.build import build
from sagellm_ir.lowering.lower import lower
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import PRESETS, Pipeline
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine
from sagellm_ir.target import DEVICE, HOST, Target, Tier, Worker
from tests.embedded.tiny import BLOCK, answers, oracle, prompt

FRONT = "canonicalize,prefix-dedup{gated=false},kv-reuse,chunk-prefill,disaggregate,schedule"
POLICIES = ("belady", "lru", "lfu", "fifo", "cost")
LIVELY = 3
"""A seed whose requests put real pressure on 16 blocks: the test below checks that they do."""
ONE = (Worker("w0"),)
SPLIT = (Worker("p", role="prefill"), Worker("d", role="decode"))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Questions about three documents, cut at different blocks; some jump the queue."""
    return make_requests(LIVELY)


def make_requests(seed: int) -> list[Request]:
    """Twelve requests; a seed says how they share and interrupt each other."""
    rng = random.Random(seed)
    documents = [prompt(rng.randint(4, 8) * BLOCK, 100 + i) for i in range(3)]
    found = []
    for number in range(12):
        document = documents[number % 3]
        shared = document[: rng.randint(2, len(document) // BLOCK) * BLOCK]
        asked = TokenPrompt(shared + prompt(rng.randint(1, 20), number))
        new, priority = rng.randint(1, 12), rng.choice((0, 0, 1))
        found.append(Request(f"r{number}", prompt=asked, max_new_tokens=new, priority=priority))
    return found


@pytest.fixture(scope="module")
def expected(model: CausalLM, requests: list[Request]) -> dict[str, list[int]]:
    """Greedy decoding of each request alone."""
    found = {}
    for request in requests:
        assert isinstance(request.prompt, TokenPrompt)
        found[request.id] = oracle(model, request.prompt.tokens, request.max_new_tokens)
    return found


def compiled(
    model: CausalLM,
    requests: list[Request],
    pipeline: str,
    workers: tuple[Worker, ...],
    blocks: int,
) -> ExecutionPlan:
    """A plan for a pool of this many blocks."""
    target = Target(
        block_size=BLOCK,
        max_tokens=48,
        max_batch=3,
        model=model.spec,
        tiers=(Tier(DEVICE, blocks), Tier(HOST, 64)),
        workers=workers,
    )
    built = build(requests, target)
    return lower(PassManager(Pipeline.parse(pipeline)).run(built.graph), built.tokens)


@pytest.mark.parametrize("workers", [ONE, SPLIT], ids=["one", "split"])
@pytest.mark.parametrize("pipeline", PRESETS)
def test_presets(
    model: CausalLM,
    requests: list[Request],
    expected: dict[str, list[int]],
    pipeline: str,
    workers: tuple[Worker, ...],
) -> None:
    plan = compiled(model, requests, pipeline, workers, blocks=96)
    engine = EmbeddedEngine(model, plan.target)
    assert answers(list(engine.execute(plan))) == expected


@pytest.mark.parametrize("spill", ["always", "never"])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_on_a_short_pool(
    model: CausalLM,
    requests: list[Request],
    expected: dict[str, list[int]],
    policy: str,
    spill: str,
) -> None:
    pipeline = f"{FRONT},evict{{policy={policy}, spill={spill}}}"
    plan = compiled(model, requests, pipeline, ONE, blocks=16)
    engine = EmbeddedEngine(model, plan.target)
    assert answers(list(engine.execute(plan))) == expected
    moved = engine.stats().moved_blocks
    prompts = sum(request.prompt_len for request in plan.requests)
    # Pressure was real: something was spilled, or computed twice.
    if spill == "always":
        assert moved > 0
    else:
        assert moved == 0
        assert engine.stats().prefill_tokens > _shared_once(plan)
    assert engine.stats().prefill_tokens < 2 * prompts


def _shared_once(plan: ExecutionPlan) -> int:
    """Prompt tokens when every shared block is computed exactly once."""
    blocks = {block for request in plan.requests for block in request.blocks}
    rest = sum(request.prompt_len - BLOCK * len(request.blocks) for request in plan.requests)
    return BLOCK * len(blocks) + rest
