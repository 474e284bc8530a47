"""What one scheduling decision costs: LMDeploy's `schedule()` and ours, in its genuine engine on a CPU.

    make build/lmdeploy/.ready && python benchmarks/lmdeploy_tick.py

256 requests run and 64 wait (half share a prefix of 1024 tokens); the executor is the tests', so that
forwards cost nothing here. CPU time of the deciding thread.
"""

import argparse
import asyncio
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "gpu")]

import numpy as np  # noqa: E402
from machine import describe  # noqa: E402
from ticks import Ticks  # noqa: E402

from tests.lmdeploy import trees  # noqa: E402

RUNNING, WAITING = 256, 64


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    shared = rng.integers(10, 900, 1024).tolist()
    return [(shared if at % 2 else []) + rng.integers(10, 900, 256).tolist() for at in range(count)]


async def run(attach: Callable[[Any], object], new: int) -> tuple[list[float], list[float]]:
    """Decisions while 256 run and 64 wait: decodes, prefills."""
    from tests.lmdeploy import cpu

    config = {"block_size": 64, "max_batch_size": RUNNING, "num_gpu_blocks": 20000}
    engine = cpu.engine(**config, max_prefill_token_num=8192, session_len=65536)
    attach(engine)
    engine.start_loop()
    ticks = Ticks(engine, clock=time.thread_time)
    asked = [
        asyncio.ensure_future(cpu.ask(engine, at + 1, prompt, new))
        for at, prompt in enumerate(prompts(RUNNING + WAITING))
    ]
    await asyncio.gather(*asked)
    trace = engine.executor.trace
    decodes, prefills = [], []
    for step, spent in zip(trace, ticks.times, strict=True):
        if not step["decode"]:
            prefills.append(spent)
        elif len(step["tokens"]) == RUNNING:
            decodes.append(spent)
    return decodes, prefills


def planned(engine: Any) -> object:
    from sagellm_ir.runtime.engines.lmdeploy.plugin import attach

    return attach("engine", engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--new", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if not trees.prepare():
        sys.exit("LMDeploy is not here; 'make build/lmdeploy/.ready' brings it")
    from tests.lmdeploy import cpu

    report: dict[str, Any] = {"machine": describe("torch", "numpy")}
    for name, attach in (("stock", lambda engine: None), ("planned", planned)):
        if args.profile and name == "planned":
            import cProfile
            import pstats

            profile = cProfile.Profile()
            profile.enable()
        decodes, prefills = cpu.run(functools.partial(run, attach, args.new), timeout=300)
        if args.profile and name == "planned":
            profile.disable()
            pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        report[name] = {"decode": figures(decodes), "prefill": figures(prefills)}
        print(name, json.dumps(report[name]))
    ratio = report["planned"]["decode"]["p50_ms"] / report["stock"]["decode"]["p50_ms"]
    print(f"decode p50, planned / stock: {ratio:.2f}")


def figures(times: list[float]) -> dict[str, float]:
    values = np.array(times or [0.0])
    names = {"p50_ms": 50, "p99_ms": 99, "max_ms": 100}
    found = {name: round(float(np.percentile(values, at)), 3) for name, at in names.items()}
    return {"ticks": len(times), **found, "sum_ms": round(float(values.sum()), 1)}


if __name__ == "__main__":
    main()
