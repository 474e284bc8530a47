"""Our kernels inside vLLM's attention, beside FlashAttention: each layer's output, then tokens.

    python benchmarks/gpu/vllm_attention.py FOLDER      # a random model is written there if it is empty

Three engines, each in a process of its own, answer the same requests, which come one after another and share
at two levels, so that decodes run alone and beside prefills:

- `layers`, without CUDA graphs: every layer with our kernels runs both, on the same inputs;
- `graphs`: our kernels under CUDA graphs;
- `theirs`: vLLM's own attention under CUDA graphs.

Fails if a layer's outputs differ by more than two roundings of bf16, if anything is left out, or if no forward had
our kernels, alone or beside a prefill. Of `graphs` and `theirs` it says where answers part, and by what margin.
"""

import argparse
import json
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from attrs import define, field

SIDES = ("layers", "graphs", "theirs")
LARGEST = 2.0**-7
"""Two roundings of bf16, as a part of 1 + the value."""


@define
class Seen:
    """What the layers of an engine ran."""

    errors: list[float] = field(factory=list)
    beside: int = 0
    """Layers of forwards that had a prefill in them, too."""

    def watch(self) -> None:
        """Run both attentions from now on; ours goes on."""
        attention: Any = import_module("sagellm_ir.runtime.engines.vllm.attention")
        ours = attention.PrefixAwareImpl.forward
        theirs = attention.FlashAttentionImpl.forward

        def both(impl: Any, layer: Any, *given: Any) -> Any:
            *inputs, meta, output = given
            if meta is None or meta.step is None:
                return ours(impl, layer, *given)
            made = torch.full_like(output, float("nan"))
            ours(impl, layer, *inputs, meta, made)
            theirs(impl, layer, *inputs, meta, output)
            mine, other = (x[: meta.num_actual_tokens].float() for x in (made, output))
            self.errors.append(float(((mine - other).abs() / (1 + other.abs())).max()))
            self.beside += meta.others is not None
            return output.copy_(made)

        attention.PrefixAwareImpl.forward = both


def prompts() -> list[list[int]]:
    """Of 29 requests: three documents behind one start, the start alone, and some that share nothing."""
    rng = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(300, 4000) for _ in range(count)]

    start = tokens(1500)
    documents = [start + tokens(700) for _ in range(3)]
    found = [d + tokens(rng.randrange(5, 120)) for d in documents for _ in range(6)]
    found += [tokens(rng.randrange(5, 400)) for _ in range(6)]
    return found + [start + tokens(3) for _ in range(5)]


def answers(engine: Any) -> dict[str, Any]:
    """Tokens of each answer, and the log-probabilities of the two likeliest at each."""
    from vllm import SamplingParams

    left = list(enumerate(prompts()))
    done: dict[str, Any] = {}
    while left or engine.has_unfinished_requests():
        for number, prompt in [left.pop(0) for _ in range(min(len(left), 1 if done else 2))]:
            params = SamplingParams(
                temperature=0,
                max_tokens=20 + number % 13 * 4,
                ignore_eos=True,
                detokenize=False,
                logprobs=2,
            )
            engine.add_request(f"r{number}", {"prompt_token_ids": prompt}, params)
        for out in engine.step():
            if out.finished:
                made = out.outputs[0]
                best = [
                    sorted((e.logprob for e in at.values()), reverse=True)[:2]
                    for at in made.logprobs
                ]
                done[out.request_id] = [list(made.token_ids), best]
    return done


def run(side: str, folder: Path) -> dict[str, Any]:
    """One engine."""
    from sagellm_ir.presets import load_target
    from sagellm_ir.runtime.accel import AccelConfig
    from sagellm_ir.runtime.engines.vllm.load import make_engine
    from sagellm_ir.target import DEVICE, HOST

    seen = Seen()
    settings: dict[str, Any] = {"enforce_eager": True}
    if side == "layers":
        seen.watch()
    else:
        sizes = [1, 2, 4, 8, 16, 32]
        graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
        settings = {"enforce_eager": False, "compilation_config": {"mode": 0, **graphs}}
    tiers = {DEVICE: {"blocks": 400}, HOST: {"blocks": 64}}
    target = load_target("h200", block_size=64, max_tokens=2048, max_batch=32, tiers=tiers)
    engine = make_engine(
        *(folder, target),
        dtype="bfloat16",
        accel=AccelConfig("off" if side == "theirs" else "prefix_aware"),
        gpu_memory_utilization=0.3,
        **settings,
    )
    return {"answers": answers(engine), "errors": seen.errors, "beside": seen.beside}


def parted(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, float, list[float]]:
    """Equal answers; the largest difference of log-probabilities before others part; and the margins there."""
    equal, largest, margins = 0, 0.0, list[float]()
    for name, (tokens, best) in theirs.items():
        mine, seen = ours[name]
        at = next(
            (i for i, pair in enumerate(zip(tokens, mine, strict=True)) if len(set(pair)) > 1), None
        )
        for one, other in list(zip(best, seen, strict=True))[:at]:
            largest = max(largest, abs(one[0] - other[0]))
        equal += at is None
        if at is not None:
            margins.append(best[at][0] - best[at][1])
    return equal, largest, sorted(margins)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        args.json.write_text(json.dumps(run(args.side, args.folder)))
        return
    if not (args.folder / "config.json").exists():
        from random_model import SMALL, write_model

        heads = {"num_attention_heads": 8, "num_key_value_heads": 1}
        write_model({**SMALL, **heads}, args.folder, readable=True)
    found = {}
    for side in SIDES:
        file = args.folder / f"{side}.json"
        command = [sys.executable, __file__, str(args.folder), "--side", side, "--json", str(file)]
        subprocess.run(command, check=True)
        found[side] = json.loads(file.read_text())
    errors, beside = found["layers"]["errors"], found["layers"]["beside"]
    print(f"{len(errors)} layers, {beside} beside a prefill: largest difference {max(errors):.4f}")
    equal, largest, margins = parted(found["graphs"]["answers"], found["theirs"]["answers"])
    print(
        f"under CUDA graphs {equal} of {len(prompts())} answers are equal; before the others part,"
    )
    print(f"log-probabilities differ by {largest:.4f} at most, and there by {margins}")
    if not 0 < beside < len(errors) or not all(error <= LARGEST for error in errors):
        raise SystemExit("our kernels were not used everywhere, or a layer is wrong")


if __name__ == "__main__":
    main()
