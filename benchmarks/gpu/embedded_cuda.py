"""The embedded engine on a GPU: are its tokens right, and what do plans and kernels gain.

    python benchmarks/gpu/embedded_cuda.py            # a CUDA machine
    python benchmarks/gpu/embedded_cuda.py --smoke    # anywhere: the check, and a tiny speed run

First the check: a small Llama of random weights in float32, random prompts that share prefixes, a
pool too small for all of them; under every preset and eviction policy the tokens must be those of
greedy decoding from scratch on the same device. Then speed: SmolLM2's shape with random weights in
bfloat16, prompts that share a document, without and with a plan.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sagellm_ir.build import build
from sagellm_ir.lowering.lower import lower
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import PRESETS, Pipeline
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, ModelConfig, random_model
from sagellm_ir.runtime.running import run_plan
from sagellm_ir.target import Device, Target, Tier

SHARING = "canonicalize,prefix-dedup,kv-reuse,chunk-prefill,disaggregate,schedule"
PIPELINES = (
    *PRESETS,
    *(f"{SHARING},evict{{policy={policy}, spill=always}}" for policy in ("belady", "lru", "cost")),
)
SMALL = ModelConfig("llama", 2, 128, 6, 2, 64, 256, 512, 4096)
SMOLLM2 = ModelConfig("llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 100000.0, tied=True)


def compiled(requests: Sequence[Request], target: Target, pipeline: str) -> ExecutionPlan:
    built = build(requests, target)
    return lower(PassManager(Pipeline.parse(pipeline)).run(built.graph), built.tokens)


def tokens_of(engine: EmbeddedEngine, plan: ExecutionPlan) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in run_plan(engine, plan).answers.items()}


def from_scratch(engine: EmbeddedEngine, target: Target, request: Request) -> list[int]:
    """Greedy decoding that runs the whole prompt and answer again for each token."""
    assert isinstance(request.prompt, TokenPrompt)
    answer: list[int] = []
    while len(answer) < request.max_new_tokens:
        prompt = TokenPrompt((*request.prompt.tokens, *answer))
        alone = Request("alone", prompt=prompt, max_new_tokens=1)
        answer += tokens_of(engine, compiled([alone], target, "O0"))["alone"]
    return answer


def prompts(rng: random.Random, vocab: int, count: int) -> Iterator[Request]:
    """Prompts out of three documents, cut at blocks, each with an end of its own."""
    documents = [[rng.randrange(vocab) for _ in range(16 * rng.randint(4, 8))] for _ in range(3)]
    for index in range(count):
        document = documents[index % 3]
        shared = document[: 16 * rng.randint(2, len(document) // 16)]
        own = [rng.randrange(vocab) for _ in range(rng.randint(1, 40))]
        yield Request(
            f"r{index}", prompt=TokenPrompt((*shared, *own)), max_new_tokens=rng.randint(1, 12)
        )


def check(device: str, seed: int) -> bool:
    """Print each pipeline's verdict; whether all are right."""
    model = random_model(SMALL, seed, device=device)
    target = Target(
        block_size=16,
        max_tokens=96,
        max_batch=6,
        model=model.spec,
        device=Device(step_overhead=1e-9),  # so that sharing pays for a model this small
        tiers=(Tier("device", 24), Tier("host", 64)),
    )
    engine = EmbeddedEngine(model, target)
    requests = [*prompts(random.Random(seed), SMALL.vocab, 12)]
    expected = {request.id: from_scratch(engine, target, request) for request in requests}
    good = True
    for pipeline in PIPELINES:
        equal = tokens_of(engine, compiled(requests, target, pipeline)) == expected
        good &= equal
        print(f"  {'equal' if equal else 'WRONG':<6} {pipeline.replace(SHARING + ',', '')}")
    total = sum(map(len, expected.values()))
    print(f"embedded on {device}, float32, seed {seed}: {len(PIPELINES)} pipelines, {total} tokens")
    return good


def speed(device: str, config: ModelConfig, size: tuple[int, int, int, int]) -> dict[str, Any]:
    """Seconds without and with a plan, for (requests, shared, own, new) tokens."""
    count, shared, own, new = size
    rng = random.Random(0)
    document = tuple(rng.randrange(config.vocab) for _ in range(shared))
    requests = [
        Request(
            f"r{i}",
            prompt=TokenPrompt((*document, *(rng.randrange(config.vocab) for _ in range(own)))),
            max_new_tokens=new,
        )
        for i in range(count)
    ]
    model = random_model(config, dtype="bfloat16", device=device)
    blocks = count * -(-(shared + own + new) // 16) + 8
    target = Target(
        block_size=16,
        max_tokens=8192,
        max_batch=count,
        model=model.spec,
        tiers=(Tier("device", blocks), Tier("host", 8)),
    )
    engine = EmbeddedEngine(model, target, stop_at_eos=False)
    row: dict[str, Any] = {"requests": count, "shared": shared, "own": own, "new": new}
    for pipeline in ("O0", "O2"):
        plan = compiled(requests, target, pipeline)
        best = min(_seconds(engine, plan) for _ in range(2))
        row[pipeline] = {"seconds": best, "tokens_per_s": count * new / best}
    print(f"speed {row}", flush=True)
    return row


def _seconds(engine: EmbeddedEngine, plan: ExecutionPlan) -> float:
    start = time.perf_counter()
    run_plan(engine, plan)
    return time.perf_counter() - start


def main() -> int:
    """Check, then time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("embedded.json"))
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; --smoke runs without one")
    device = "cpu" if options.smoke else "cuda"
    seed = random.randrange(2**31) if options.seed is None else options.seed
    if not check(device, seed):
        return 1
    if options.no_speed:
        return 0
    sizes = ((2, 32, 8, 4),) if options.smoke else ((64, 2048, 32, 64), (64, 16, 32, 64))
    config = SMALL if options.smoke else SMOLLM2
    rows = [speed(device, config, size) for size in sizes]
    if not options.smoke:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
