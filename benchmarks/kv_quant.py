"""What quantised KV costs and saves on the demo model: accuracy, memory and speed, in one run.

Accuracy: windows of English text are run with their KV stored in each way, every token reading the
KV before it as stored. Against native KV: the mean KL divergence of next-token distributions, the
share of positions with the same likeliest token, and perplexity. Text: the language reference that
ships with Python (`pydoc_data`), windows drawn at random. Scales of each head are measured on other
windows than those that count.

Speed: seconds of CPU time of prefill and of decode on random prompts, ways taking turns, the best
round counts.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/kv_quant.py --json kv_quant.json
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from attrs import asdict, define, evolve, field, frozen
from embedded import BLOCK, Shape, plan, prompts_of
from machine import describe
from rich.console import Console
from rich.table import Table

from sagellm_ir.lowering.plan import PlanRequest
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine, load_model
from sagellm_ir.runtime.engines.embedded.calibrate import forward_all, measure_profile
from sagellm_ir.runtime.engines.embedded.pool import KVPool
from sagellm_ir.runtime.protocols import KVSchemaConfig, QuantizationProfile
from sagellm_ir.target import Target, Tier

MODEL = "smollm2-135m"


@frozen
class Way:
    """One way to store KV."""

    name: str
    config: KVSchemaConfig


@define
class Row:
    """What one way gave."""

    name: str
    bytes_per_token: float
    perplexity: float = 0.0
    kl: float = 0.0
    """Mean, in nats."""
    worst_kl: float = 0.0
    same: float = 0.0
    """Share of positions with native KV's likeliest token."""
    prefill: dict[str, float] = field(factory=dict)
    """By workload, prompt tokens a second of CPU time."""
    decode: dict[str, float] = field(factory=dict)


def ways(model: CausalLM, folder: Path, prompts: Sequence[Sequence[int]]) -> list[Way]:
    """Native KV first. The last two have one scale for all tokens, as vLLM's and LMDeploy's fp8."""
    measured = measure_profile(model, prompts, "fp8_e4m3")
    ones = tuple((1.0,) * model.config.kv_heads for _ in range(model.config.layers))
    files = {
        "fp8_e4m3, a measured scale a head": measured,
        "fp8_e4m3, no scales": evolve(measured, key_scales=ones, value_scales=ones),
        "int8, a measured scale a head": measure_profile(model, prompts, "int8"),
    }
    made = [Way(f"{model.dtype_name} (native)", KVSchemaConfig())]
    made += [Way(name, KVSchemaConfig(dtype=name)) for name in ("bf16", "int8", "fp8_e4m3", "fp8_e5m2")]  # fmt: skip
    for number, (name, profile) in enumerate(files.items()):
        path = folder / f"{number}.json"
        profile.save(path)
        made.append(Way(name, KVSchemaConfig(profile=str(path))))
    return made


def windows(model: CausalLM, length: int, count: int, seed: int) -> list[list[int]]:
    """Random windows of the text."""
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    rng = random.Random(seed)
    starts = [rng.randrange(len(tokens) - length) for _ in range(count)]
    return [list(tokens[start : start + length]) for start in starts]


def pool_of(model: CausalLM, way: Way, tokens: int) -> KVPool:
    """A pool that stores KV this way."""
    schema = way.config.schema(model.spec, BLOCK, model.dtype_name)
    profile: QuantizationProfile | None = way.config.quantization(model.dtype_name)
    return KVPool(schema, {"device": -(-tokens // BLOCK)}, model.dtype, model.device, profile)


def accuracy(model: CausalLM, every: Sequence[Way], rows: Sequence[Row], texts: list[list[int]]) -> None:  # fmt: skip
    """Fill in perplexity, KL and agreement."""
    for tokens in texts:
        native = None
        for way, row in zip(every, rows, strict=True):
            logits = forward_all(model, pool_of(model, way, len(tokens)).layers, tokens)
            found = logits[:-1].log_softmax(-1)
            native = found if native is None else native
            told = found.gather(1, torch.tensor(tokens[1:])[:, None])
            row.perplexity -= told.double().mean().item() / len(texts)
            kl = (native.exp() * (native - found)).sum(-1)
            row.kl += kl.double().mean().item() / len(texts)
            row.worst_kl = max(row.worst_kl, kl.max().item())
            same = (found.argmax(-1) == native.argmax(-1)).double().mean().item()
            row.same += same / len(texts)
    for row in rows:
        row.perplexity = float(torch.tensor(row.perplexity).exp())


def speed(
    model: CausalLM, every: Sequence[Way], rows: Sequence[Row], shapes: dict[str, Shape], rounds: int
) -> None:  # fmt: skip
    """Fill in the rates."""
    blocks = max(s.batch * -(-(s.prompt + s.new) // BLOCK) for s in shapes.values())
    tiers = (Tier("device", blocks),)
    engines = []
    for way in every:
        spec = way.config.fit(model.spec, model.dtype_name)
        target = Target(block_size=BLOCK, tiers=tiers, model=spec)
        engines.append(EmbeddedEngine(model, target, stop_at_eos=False, kv_schema=way.config))
    for name, shape in shapes.items():
        for turn in range(rounds + 1):  # round 0 warms up
            prompts = prompts_of(shape, model.config.vocab, turn)
            pairs = list(zip(engines, rows, strict=True))
            for engine, row in pairs[:: 1 if turn % 2 else -1]:
                prefill, decode = one_run(engine, shape, prompts)
                if turn:
                    rates = (shape.batch * shape.prompt / prefill, shape.batch * (shape.new - 1) / decode)  # fmt: skip
                    for kept, rate in zip((row.prefill, row.decode), rates, strict=True):
                        kept[name] = max(kept.get(name, 0.0), rate)


def one_run(engine: EmbeddedEngine, shape: Shape, prompts: list[list[int]]) -> tuple[float, float]:
    """CPU seconds of prefill and of decode."""
    for i, tokens in enumerate(prompts):
        made = PlanRequest(f"r{i}", max_new_tokens=shape.new, prompt_len=len(tokens), tokens=tuple(tokens))  # fmt: skip
        engine.submit(made)
    prefills, decode = plan(shape)
    begin = time.process_time()
    for step in prefills:
        engine.step(step)
    middle = time.process_time()
    engine.step(decode)
    return middle - begin, time.process_time() - middle


def tables(rows: Sequence[Row], shapes: dict[str, Shape]) -> Iterator[Table]:
    """Accuracy and memory; speed."""
    first = rows[0]
    table = Table(title=f"{MODEL}: accuracy and memory")
    for column in ("KV", "B/token", "of native", "perplexity", "KL, nats", "worst", "same token"):
        table.add_column(column, justify="left" if column == "KV" else "right")
    for row in rows:
        share = row.bytes_per_token / first.bytes_per_token
        table.add_row(
            row.name,
            f"{row.bytes_per_token:.0f}",
            f"{share:.3f}",
            f"{row.perplexity:.4f}",
            f"{row.kl:.2e}",
            f"{row.worst_kl:.2e}",
            f"{row.same:.2%}",
        )
    yield table
    table = Table(title="Tokens a second of CPU time, and that over native's")
    table.add_column("KV")
    for name in shapes:
        for what in ("prefill", "x", "decode", "x"):
            table.add_column(what if what == "x" else f"{name} {what}", justify="right")
    for row in rows:
        cells = []
        for name in shapes:
            for rates, base in ((row.prefill, first.prefill), (row.decode, first.decode)):
                cells += [f"{rates[name]:.1f}", f"{rates[name] / base[name]:.2f}"]
        table.add_row(row.name, *cells)
    yield table


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="float32", help="of weights and activations")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = describe("torch") | {"threads": str(options.threads)}
    model = load_model(MODEL, options.dtype)
    shapes = {
        "1 x 512": Shape(1, 0, 512, 32),
        "4 x 512": Shape(4, 0, 512, 32),
        "8 share 2048": Shape(8, 2048, 16, 32),
    }
    with tempfile.TemporaryDirectory() as folder:
        calibration = windows(model, options.length, 4, options.seed + 1)
        every = ways(model, Path(folder), calibration)
        rows = [
            Row(way.name, way.config.schema(model.spec, BLOCK, model.dtype_name).token_bytes)
            for way in every
        ]
        texts = windows(model, options.length, options.windows, options.seed)
        accuracy(model, every, rows, texts)
        speed(model, every, rows, shapes, options.rounds)
    console = Console(width=140)
    for table in tables(rows, shapes):
        console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if options.json:
        found = {"machine": about, "options": {k: str(v) for k, v in vars(options).items()}}
        options.json.write_text(json.dumps(found | {"rows": [asdict(r) for r in rows]}, indent=2))


if __name__ == "__main__":
    main()
