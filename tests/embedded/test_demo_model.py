"""SmolLM2 under compiled plans of every preset and policy: the tokens of transformers' `generate`."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.passes.pipeline import PRESETS
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine, load_model
from sagellm_ir.runtime.engines.embedded.export import export_folder
from sagellm_ir.runtime.running import RunReport, run_plan
from sagellm_ir.target import DEVICE, HOST, Device, Target, Tier

BLOCK = 16
FRONT = "canonicalize,prefix-dedup,kv-reuse,chunk-prefill,disaggregate,schedule"
LIVELY = 3
"""A seed whose requests do not fit the pool: the tests below check that."""

Answers = dict[str, list[int]]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def requests() -> dict[Request, tuple[int, ...]]:
    """Questions about three documents, with their tokens; some jump the queue."""
    rng = random.Random(LIVELY)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000, 40000) for _ in range(count))

    documents = [tokens(rng.randint(4, 8) * BLOCK) for _ in range(3)]
    found = {}
    for number in range(9):
        document = documents[number % 3]
        shared = document[: rng.randint(2, len(document) // BLOCK) * BLOCK]
        asked = shared + tokens(rng.randint(1, 40))
        new, priority = rng.randint(2, 8), rng.choice((0, 0, 1))
        prompt = TokenPrompt(asked)
        found[Request(f"r{number}", prompt=prompt, max_new_tokens=new, priority=priority)] = asked
    return found


@pytest.fixture(scope="module")
def expected(
    requests: dict[Request, tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """What `generate` answers to each request alone, in fp32."""
    folder = export_folder("smollm2-135m", Path(tmp_path_factory.mktemp("hf")), "float32")
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = {}
    for request, tokens in requests.items():
        new = request.max_new_tokens
        row = theirs.generate(
            torch.tensor([tokens]), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        answers[request.id] = row[0, len(tokens) :].tolist()
    return answers


def run(model: CausalLM, requests: dict[Request, tuple[int, ...]], pipeline: str) -> RunReport:
    """On a pool one block larger than the largest request."""
    need = max(-(-(len(tokens) + r.max_new_tokens) // BLOCK) for r, tokens in requests.items())
    target = Target(
        block_size=BLOCK,
        max_tokens=96,
        max_batch=3,
        model=model.spec,
        device=Device(step_overhead=1e-9),  # so that the gate lets every prefix be shared
        tiers=(Tier(DEVICE, need + 1), Tier(HOST, 64)),
    )
    plan = compile_requests(list(requests), target, pipeline).plan
    return run_plan(EmbeddedEngine(model, target, stop_at_eos=False), plan)


@pytest.mark.parametrize("pipeline", PRESETS)
def test_presets(
    model: CausalLM, requests: dict[Request, tuple[int, ...]], expected: Answers, pipeline: str
) -> None:
    report = run(model, requests, pipeline)
    assert {name: answer.tokens for name, answer in report.answers.items()} == expected


@pytest.mark.parametrize("policy", ["belady", "lru", "lfu", "fifo", "cost"])
def test_policies(
    model: CausalLM, requests: dict[Request, tuple[int, ...]], expected: Answers, policy: str
) -> None:
    spilled = run(model, requests, f"{FRONT},evict{{policy={policy}, spill=always}}")
    dropped = run(model, requests, f"{FRONT},evict{{policy={policy}, spill=never}}")
    for report in (spilled, dropped):
        assert {name: answer.tokens for name, answer in report.answers.items()} == expected
    assert spilled.moved_blocks > 0 == dropped.moved_blocks
    assert dropped.computed_tokens > spilled.computed_tokens
