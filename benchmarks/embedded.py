"""The embedded engine beside transformers, on one machine in one run.

Cells: prefill and decode, batch 1 and 8, bf16 and fp32, transformers with its dynamic and its static
cache; then a workload whose prompts share a document. Engines take turns; the best of the rounds
counts, which is what is left when neighbours disturb a machine least. Prompts are random tokens,
new ones each round.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/embedded.py --json out.json
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from attrs import asdict, define, field, frozen
from machine import describe
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, StaticCache

from sagellm_ir.lowering.plan import Bind, PlanRequest, PlanStep, PrefillChunk, PrefixGroup
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, load_model
from sagellm_ir.runtime.engines.embedded.export import export_folder
from sagellm_ir.target import Target, Tier

BLOCK = 16
OURS = "sagellm-ir"


@frozen
class Shape:
    """One workload: `batch` prompts of `shared + own` tokens, of which the first are common."""

    batch: int
    shared: int
    own: int
    new: int

    @property
    def prompt(self) -> int:
        """Tokens of one prompt."""
        return self.shared + self.own


@define
class Cell:
    """Best rates of one engine on one workload, tokens a second."""

    dtype: str
    workload: str
    engine: str
    prefill: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    """New tokens a second of the whole run."""
    rounds: list[tuple[float, float]] = field(factory=list)
    """Seconds of prefill and of decode, each round."""

    def add(self, shape: Shape, prefill: float, decode: float) -> None:
        """Take one round's seconds."""
        self.rounds.append((prefill, decode))
        self.prefill = max(self.prefill, shape.batch * shape.prompt / prefill)
        self.decode = max(self.decode, shape.batch * (shape.new - 1) / decode)
        self.total = max(self.total, shape.batch * shape.new / (prefill + decode))


Runner = Callable[[Shape, list[list[int]]], tuple[float, float, list[list[int]]]]
"""Seconds of prefill, seconds of decode, and the tokens."""


def prompts_of(shape: Shape, vocab: int, seed: int) -> list[list[int]]:
    """Random prompts that start alike."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(vocab, (shape.shared,), generator=generator).tolist()
    own = torch.randint(vocab, (shape.batch, shape.own), generator=generator).tolist()
    return [shared + tail for tail in own]


def plan(shape: Shape) -> tuple[list[PlanStep], PlanStep]:
    """The prefill steps and the decode step: what our compiler makes of this workload, by hand."""
    names = [f"r{i}" for i in range(shape.batch)]
    shared = shape.shared // BLOCK
    own = -(-(shape.prompt + shape.new) // BLOCK) - shared
    doc = tuple(range(shared))
    start = shape.shared
    binds = tuple(
        Bind(name, 0, (*doc, *range(shared + i * own, shared + (i + 1) * own)))
        for i, name in enumerate(names)
    )
    rest = tuple(PrefillChunk(name, start, shape.prompt) for name in names)
    groups = (PrefixGroup(0, start, tuple(names)),) if start else ()
    steps = [PlanStep(1, binds=binds, prefill=rest, groups=groups)]
    if start:
        steps.insert(0, PlanStep(0, binds=binds[:1], prefill=(PrefillChunk("r0", 0, start),)))
    return steps, PlanStep(2, decode=tuple(names), loops=shape.new - 1, groups=groups)


def ours(dtype: str, shapes: Sequence[Shape]) -> Runner:
    """The embedded engine, with a pool for the largest workload."""
    model = load_model("smollm2-135m", dtype)
    blocks = max(s.batch * -(-(s.prompt + s.new) // BLOCK) for s in shapes)
    target = Target(block_size=BLOCK, tiers=(Tier("device", blocks),), model=model.spec)
    engine = EmbeddedEngine(model, target, stop_at_eos=False)

    def run(shape: Shape, prompts: list[list[int]]) -> tuple[float, float, list[list[int]]]:
        for i, tokens in enumerate(prompts):
            engine.submit(
                PlanRequest(
                    f"r{i}",
                    max_new_tokens=shape.new,
                    prompt_len=len(tokens),
                    tokens=tuple(tokens),
                )
            )
        prefills, decode = plan(shape)
        events = []
        begin = time.perf_counter()
        for step in prefills:
            events += engine.step(step)
        middle = time.perf_counter()
        events += engine.step(decode)
        end = time.perf_counter()
        answers: list[list[int]] = [[] for _ in prompts]
        for event in events:
            if event.token is not None:
                answers[int(event.request[1:])].append(event.token)
        return middle - begin, end - middle, answers

    return run


def theirs(model: Any, static: bool) -> Runner:
    """transformers' forward under a bare greedy loop: less work a token than its `generate`."""

    @torch.inference_mode()
    def run(shape: Shape, prompts: list[list[int]]) -> tuple[float, float, list[list[int]]]:
        longest = shape.prompt + shape.new
        cache = (
            StaticCache(config=model.config, max_cache_len=longest)
            if static
            else DynamicCache(config=model.config)
        )
        begin = time.perf_counter()
        ids = torch.tensor(prompts)
        out = [_forward(model, ids, cache)]
        middle = time.perf_counter()
        for _ in range(shape.new - 1):
            out.append(_forward(model, out[-1], cache))
        end = time.perf_counter()
        return middle - begin, end - middle, torch.cat(out, 1).tolist()

    return run


def _forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The next token of each row, as a column."""
    logits: torch.Tensor = model(
        ids, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    return logits[:, -1:].argmax(-1)


def measure(
    dtype: str, shapes: dict[str, Shape], rounds: int, folder: Path
) -> Iterator[tuple[Cell, float]]:
    """Cells of one dtype, each with the share of tokens that equal transformers' (dynamic)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    runners = {
        OURS: ours(dtype, list(shapes.values())),
        "transformers dynamic": theirs(model, static=False),
        "transformers static": theirs(model, static=True),
    }
    for name, shape in shapes.items():
        cells = {engine: Cell(dtype, name, engine) for engine in runners}
        agree = dict.fromkeys(runners, 0.0)
        for turn in range(-1, rounds):  # turn -1 warms caches and is not counted
            prompts = prompts_of(shape, model.config.vocab_size, seed=turn + 1)
            order = list(runners)[:: 1 if turn % 2 else -1]
            found = {}
            for engine in order:
                prefill, decode, found[engine] = runners[engine](shape, prompts)
                if turn >= 0:
                    cells[engine].add(shape, prefill, decode)
            base = list(chain.from_iterable(found["transformers dynamic"]))
            for engine in runners:
                pairs = zip(chain.from_iterable(found[engine]), base, strict=True)
                agree[engine] += sum(a == b for a, b in pairs) / len(base) / (rounds + 1)
        yield from ((cells[engine], agree[engine]) for engine in runners)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return describe("torch", "transformers") | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
    }


def show(cells: list[tuple[Cell, float]], about: dict[str, Any]) -> None:
    """One table, rates in tokens a second, ratios of ours to each transformers."""
    table = Table(title="SmolLM2-135M, tokens/s (best of the rounds; x: sagellm-ir / this)")
    columns = ("dtype", "workload", "engine", "prefill", "x", "decode", "x", "run", "x", "same")
    for column in columns:
        table.add_column(column, justify="left" if len(column) > 5 else "right")
    best = {(c.dtype, c.workload): c for c, _ in cells if c.engine == OURS}
    for cell, same in cells:
        mine = best[cell.dtype, cell.workload]
        row = [cell.dtype, cell.workload, cell.engine]
        for rate, own in (
            (cell.prefill, mine.prefill),
            (cell.decode, mine.decode),
            (cell.total, mine.total),
        ):
            row += [f"{rate:.1f}", "" if cell is mine else f"{own / rate:.2f}"]
        table.add_row(*row, f"{same:.0%}", end_section=cell.engine.endswith("static"))
    console = Console(width=120)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the unshared prompts")
    parser.add_argument("--new", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--document", type=int, default=1024, help="tokens all prompts share")
    parser.add_argument("--only", default="", help="run workloads with this in their name")
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    every = {
        "batch 1": Shape(1, 0, options.prompt, options.new),
        "batch 8": Shape(8, 0, options.prompt, options.new),
        "shared document x16": Shape(16, options.document, 64, options.new),
    }
    shapes = {name: shape for name, shape in every.items() if options.only in name}
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        path = export_folder("smollm2-135m", Path(folder))
        dtypes = options.dtypes.split(",")
        cells = [c for dtype in dtypes for c in measure(dtype, shapes, options.rounds, path)]
    about["load after"] = describe()["load"]
    show(cells, about)
    if options.json:
        found = [asdict(cell) | {"same_tokens": same} for cell, same in cells]
        options.json.write_text(json.dumps({"machine": about, "cells": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
