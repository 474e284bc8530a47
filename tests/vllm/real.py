"""SmolLM2 in real vLLM engines, and requests that share and press."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams

from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime.engines.vllm.load import _environment
from sagellm_ir.target import DEVICE, HOST

BLOCK = 32
BLOCKS = 8
"""One more than the largest request needs."""
OVERRIDES = {
    "block_size": BLOCK,
    "max_tokens": 96,
    "max_batch": 3,
    "device": {"step_overhead": 1e-9},  # so that sharing pays for a model this small
    "tiers": {DEVICE: {"blocks": BLOCKS}, HOST: {"blocks": 32}},
}
LIVELY = 21
"""A seed whose requests do not fit the pool: the tests check that."""


def tokens_of(request: Request) -> tuple[int, ...]:
    """Its prompt."""
    assert isinstance(request.prompt, TokenPrompt)
    return request.prompt.tokens


def workload(seed: int = LIVELY, count: int = 8) -> list[Request]:
    """Questions about three documents, cut at different blocks; some jump the queue."""
    rng = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000, 40000) for _ in range(length))

    documents = [tokens(rng.randint(3, 5) * BLOCK) for _ in range(3)]
    found = []
    for number in range(count):
        document = documents[number % 3]
        shared = document[: rng.randint(2, len(document) // BLOCK) * BLOCK]
        prompt = TokenPrompt(shared + tokens(rng.randint(1, 40)))
        new, priority = rng.randint(2, 8), rng.choice((0, 0, 1))
        found.append(Request(f"r{number}", prompt=prompt, max_new_tokens=new, priority=priority))
    return found


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """For vLLM's `LLM`; what is left out is vLLM's default."""
    return {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": 1024,
        "block_size": BLOCK,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**28,
        **more,
    }


def default_answers(
    folder: Path, asked: Iterable[tuple[Request, SamplingParams]], **more: Any
) -> dict[str, Any]:
    """What vLLM answers by itself: its own scheduler, its own prefix caching; outputs by request.

    `more` settings are its own. Those that are sampled run alone: vLLM 0.27 loses seeds in mixed batches.
    """
    pairs = list(asked)
    greedy = [pair for pair in pairs if pair[1].temperature == 0]
    with _environment():
        engine = LLM(**settings(folder, **more))
        found: dict[str, Any] = {}
        for batch in (greedy, *([pair] for pair in pairs if pair not in greedy)):
            prompts = [{"prompt_token_ids": list(tokens_of(request))} for request, _ in batch]
            outputs = engine.generate(prompts, [params for _, params in batch], use_tqdm=False)
            found |= {r.id: out.outputs[0] for (r, _), out in zip(batch, outputs, strict=True)}
        engine.llm_engine.engine_core.shutdown()
    return found


def pad_heads(source: Path, out: Path, kv_heads: int) -> Path:
    """The same function with more heads: zero rows for q, k and v, zero columns for o.

    SmolLM2 has 9 heads over 3 KV heads, which two ranks cannot share evenly.
    """
    config = json.loads((source / "config.json").read_text())
    heads, width = config["num_attention_heads"], config["head_dim"]
    group = heads // config["num_key_value_heads"]
    weights = load_file(source / "model.safetensors")
    wanted = {"q_proj": kv_heads * group, "k_proj": kv_heads, "v_proj": kv_heads}
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if kind in wanted:
            padded = torch.zeros(wanted[kind] * width, weight.shape[1])
            padded[: weight.shape[0]] = weight
        elif kind == "o_proj":
            padded = torch.zeros(weight.shape[0], kv_heads * group * width)
            padded[:, : weight.shape[1]] = weight
        else:
            continue
        weights[name] = padded
    out.mkdir()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config |= {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads}
    (out / "config.json").write_text(json.dumps(config))
    for file in source.glob("*token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out
