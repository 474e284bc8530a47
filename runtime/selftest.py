"""`self_test`: does the embedded engine give, under every pipeline, the tokens of plain greedy decoding?"""

import random
from collections.abc import Iterator, Sequence

from attrs import frozen

from sagellm_ir.build import build
from sagellm_ir.lowering.lower import lower
from sagellm_ir.lowering.plan import ExecutionPlan, KVMove
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import PRESETS, Pipeline
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime.backend import InferenceBackend
from sagellm_ir.runtime.running import run_plan
from sagellm_ir.target import Device, Target, Tier

__all__ = ["SelfTest", "self_test", "tight_requests"]

POLICIES = ("belady", "lru", "lfu", "fifo", "cost")
SPILLS = ("always", "never")
SHARING = "canonicalize,prefix-dedup,kv-reuse,chunk-prefill,disaggregate,schedule"
VOCABULARY = 256


@frozen
class SelfTest:
    """One pipeline's result."""

    pipeline: str
    requests: int
    steps: int
    moved_blocks: int
    computed: int
    """Prompt tokens that ran through the model."""
    equal: bool
    """Whether every answer is the one of plain greedy decoding."""


def self_test(seed: int | None = None) -> Iterator[SelfTest]:
    """Runs random requests that share prefixes, on a pool too small for all of them.

    The reference recomputes each token from scratch: one request at a time, no KV kept.

    The engine is the embedded one, with a small Llama of random weights.

    Args:
        seed: of model and requests; None takes a fresh one.
    """
    seed = random.randrange(2**31) if seed is None else seed
    engine, target = _make(seed)
    requests = tight_requests(random.Random(seed), target, range(VOCABULARY))
    expected = {request.id: _from_scratch(engine, target, request) for request in requests}
    pipelines = [
        *PRESETS,
        *(
            f"{SHARING},evict{{policy={policy}, spill={spill}}}"
            for policy in POLICIES
            for spill in SPILLS
        ),
    ]
    for pipeline in pipelines:
        report = run_plan(engine, _compile(requests, target, pipeline))
        answers = {answer.request: answer.tokens for answer in report.answers.values()}
        yield SelfTest(
            pipeline.replace(SHARING + ",", ""),
            len(requests),
            report.steps,
            report.moved_blocks,
            report.computed_tokens,
            answers == expected,
        )


def _make(seed: int) -> tuple[InferenceBackend, Target]:
    """An engine, and a target whose device tier holds one large request, and not all that is shared."""
    from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, ModelConfig, random_model

    config = ModelConfig(
        architecture="llama",
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=128,
        vocab=VOCABULARY,
        max_position=4096,
    )
    model = random_model(config, seed)
    target = Target(
        block_size=4,
        max_tokens=48,
        max_batch=3,
        model=model.spec,
        device=Device(step_overhead=1e-9),  # so that sharing pays for a model this small
        tiers=(Tier("device", 16), Tier("host", 64)),
    )
    return EmbeddedEngine(model, target), target


def tight_requests(rng: random.Random, target: Target, drawn: Sequence[int]) -> list[Request]:
    """Random requests that do not fit the pool: their O2 plan has to move KV out of the way.

    Args:
        rng: what draws them.
        target: with a pool for one large request, and a tier to move KV to.
        drawn: the token ids that prompts are made of.
    """
    for _ in range(100):
        requests = _requests(rng, target, drawn)
        if any(isinstance(a, KVMove) for s in _compile(requests, target, "O2").steps for a in s.kv):
            return requests
    raise AssertionError("a hundred draws of requests all fit the pool")


def _requests(rng: random.Random, target: Target, drawn: Sequence[int]) -> list[Request]:
    """Twelve prompts out of three documents, a few of them equal but for the last tokens."""
    block = target.block_size

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.choice(drawn) for _ in range(count))

    documents = [tokens(rng.randint(4, 8) * block) for _ in range(3)]
    requests = []
    for index in range(12):
        document = documents[index % 3]
        shared = document[: rng.randint(2, len(document) // block) * block]
        prompt = TokenPrompt(shared + tokens(rng.randint(1, 20)))
        requests.append(
            Request(
                f"r{index}",
                prompt=prompt,
                max_new_tokens=rng.randint(1, 12),
                priority=rng.choice((0, 0, 1)),
            )
        )
    return requests


def _compile(requests: Sequence[Request], target: Target, pipeline: str) -> ExecutionPlan:
    built = build(requests, target)
    return lower(PassManager(Pipeline.parse(pipeline)).run(built.graph), built.tokens)


def _from_scratch(engine: InferenceBackend, target: Target, request: Request) -> list[int]:
    """Greedy decoding that runs the whole prompt and answer again for each token."""
    assert isinstance(request.prompt, TokenPrompt)
    answer: list[int] = []
    while len(answer) < request.max_new_tokens:
        prompt = TokenPrompt((*request.prompt.tokens, *answer))
        alone = Request("reference", prompt=prompt, max_new_tokens=1)
        report = run_plan(engine, _compile([alone], target, "O0"))
        answer += report.answers["reference"].tokens
    return answer
