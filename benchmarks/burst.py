"""How long the online planner takes when many requests come at once, before a device has work.

    python benchmarks/burst.py --rounds 7

Planner alone, set up as `runtime/engines/lmdeploy/plugin.py` does it. Each row of `gpu/lmdeploy_rows.py`'s
kind, requests at once: milliseconds to submit all, of the first decision (with the first compilation), and
of the decisions after it until all prefills are given out. "again": the prefix was computed before. Medians
of rounds, of the clock and of CPU time, each with a planner of its own. `plans` are digests of the steps:
equal ones are equal plans.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from statistics import median
from typing import Any

import numpy as np
from attrs import evolve
from machine import describe
from rich.console import Console
from rich.table import Table

from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.target import DEVICE, Target, Tier, Worker

ROWS = (
    ("64 x 1024, nothing shared", 64, 0, 1024, False),
    ("64 x (8192 + 128), cold", 64, 8192, 128, False),
    ("64 x (8192 + 128), again", 64, 8192, 128, True),
    ("256 x (8192 + 128), cold", 256, 8192, 128, False),
    ("256 x (8192 + 128), again", 256, 8192, 128, True),
    ("128 x (32768 + 128), cold", 128, 32768, 128, False),
    ("128 x (32768 + 128), again", 128, 32768, 128, True),
)
"""Name; requests; tokens that they share, and that each has of its own; whether the shared are cached."""
ANSWER = 128
PARTS = ("submit", "first", "rest")

Times = dict[str, list[float]]


def target() -> Target:
    """What LMDeploy is on an H200 beside a model of 7e9 parameters."""
    return evolve(
        load_target("h200"),
        engine="lmdeploy",
        block_size=64,
        max_tokens=8192,
        max_batch=256,
        max_loops=16,
        mixed=False,
        tiers=(evolve(load_target("h200").tier(DEVICE) or Tier(DEVICE, 0), blocks=28_643),),
        workers=(Worker("w0"),),
    )


@contextmanager
def timed(times: Times, part: str) -> Iterator[None]:
    """Notes the milliseconds of a block, of the clock and of the processor."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    times.setdefault(part, []).append((time.perf_counter() - wall) * 1e3)
    times.setdefault(f"{part} cpu", []).append((time.process_time() - cpu) * 1e3)


def submit(planner: OnlinePlanner, name: str, prompt: Any) -> None:
    """One request, as `online.py` submits it."""
    request = PlanRequest(name, max_new_tokens=ANSWER, prompt_len=len(prompt))
    planner.submit(request, prompt)
    planner.meet(name)


def run(row: tuple[str, int, int, int, bool], times: Times) -> str:
    """One round; the digest of the steps."""
    _, count, shared, own, again = row
    rng = np.random.default_rng(count + shared)
    prefix: Any = rng.integers(1000, 150_000, shared)
    prompts = [
        np.concatenate((prefix, rng.integers(1000, 150_000, own)), dtype=np.int64)
        for _ in range(count)
    ]
    planner = OnlinePlanner(target(), window=64, outlast=True)
    if again:
        submit(planner, "before", prefix)
        while planner.advance(lambda name: ANSWER) is not None:
            pass
        planner.end("before", prefix)
    with timed(times, "submit"):
        for number, prompt in enumerate(prompts):
            submit(planner, str(number), prompt)
    with timed(times, "first"):
        steps = [planner.advance(lambda name: ANSWER)]
    with timed(times, "rest"):
        while started(steps) < count:
            steps.append(planner.advance(lambda name: ANSWER))
    return sha256(repr(steps).encode()).hexdigest()[:12]


def started(steps: list[PlanStep | None]) -> int:
    """How many requests have a prefill in some step."""
    return len({chunk.request for step in steps if step for chunk in step.prefill})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each row")
    parser.add_argument("--rows", default="0,1,2,3,4,5,6", help="numbers of rows")
    arguments = parser.parse_args()
    Console(stderr=True).print(json.dumps(describe("attrs", "numpy")), highlight=False)
    table = Table("requests", *(f"{part}{of}" for part in PARTS for of in ("", " cpu")), "plans")
    for number in map(int, arguments.rows.split(",")):
        run(ROWS[number], {})  # what is lazy
        times: Times = {}
        plans = {run(ROWS[number], times) for _ in range(arguments.rounds)}
        cells = [f"{median(times[f'{part}{of}']):.2f}" for part in PARTS for of in ("", " cpu")]
        table.add_row(ROWS[number][0], *cells, " ".join(sorted(plans)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
