"""What one scheduling decision costs: LMDeploy's `schedule()` and ours, in its genuine engine on a CPU.

    make build/lmdeploy/.ready && python benchmarks/lmdeploy_tick.py

320 clients keep 256 requests running and up to 64 waiting: each sends its next request when its answer
has ended (half share a prefix of 1024 tokens; answers of 64 to 512 tokens). "burst": the decisions of
the first second, when all 320 come at once; "steady": those after it. "blocking": the part of a
decision while no forward is under way; the rest delays nobody but a forward shorter than itself.
"outside": what was done between the decision before and this one, while forwards ran (compilations).
Stock and ours alternate, in one process each; CPU time of the deciding thread. The executor is the
tests', so that forwards cost nothing here.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "gpu")]

import numpy as np  # noqa: E402
from machine import describe  # noqa: E402
from ticks import Ticks  # noqa: E402

from tests.lmdeploy import trees  # noqa: E402

RUNNING, WAITING = 256, 64
SHARED, OWN, SHORTEST, LONGEST = 1024, 256, 64, 512
NAMES = ("stock", "planned")


async def run(engine: Any, requests: int) -> dict[str, Any]:
    """Clients that send `requests` each; the decisions by kind."""
    from tests.lmdeploy import cpu

    engine.executor._forward = lambda tables, starts, rows: np.full(len(rows), 11)
    engine.start_loop()
    ticks = Ticks(engine, clock=time.thread_time)
    rng = np.random.default_rng(0)
    shared = rng.integers(10, 900, SHARED).tolist()

    async def client(number: int) -> None:
        own = np.random.default_rng(number + 1)
        for turn in range(requests):
            prompt = (shared if number % 2 else []) + own.integers(10, 900, OWN).tolist()
            new = int(own.integers(SHORTEST, LONGEST + 1))
            await cpu.ask(engine, 1 + number + turn * (RUNNING + WAITING), prompt, new)

    await asyncio.gather(*map(client, range(RUNNING + WAITING)))
    full: dict[str, list[int]] = {"burst": [], "steady decode": [], "steady prefill": []}
    decoded = False
    for at, step in enumerate(engine.executor.trace):
        rows, decode = len(step["tokens"]), step["decode"]
        decoded |= decode and rows > RUNNING * 0.9
        if not decoded:
            full["burst"].append(at)
        elif not decode:
            full["steady prefill"].append(at)
        elif rows > RUNNING * 0.9:
            full["steady decode"].append(at)
    report: dict[str, Any] = {}
    for kind, where in {**full, "steady": full["steady decode"] + full["steady prefill"]}.items():
        parts = {"": ticks.times, ", blocking": ticks.blocking, ", outside": ticks.outside}
        for name, times in parts.items():
            report[kind + name] = figures([times[at] for at in where])
    loops = [step["loops"] for step in engine.executor.trace if step["decode"]]
    report["forwards of a decode decision"] = round(float(np.mean(loops)), 2)
    return report


def measure(name: str, requests: int, profile: bool) -> None:
    """One process: print the figures of one configuration."""
    if not trees.prepare():
        sys.exit("LMDeploy is not here; 'make build/lmdeploy/.ready' brings it")
    from tests.lmdeploy import cpu

    async def work() -> dict[str, Any]:
        config = {"block_size": 64, "max_batch_size": RUNNING, "num_gpu_blocks": 20000}
        engine = cpu.engine(**config, max_prefill_token_num=8192, session_len=65536)
        if name == "planned":
            from sagellm_ir.runtime.engines.lmdeploy.plugin import attach

            attach("engine", engine)
        return await run(engine, requests)

    if profile:
        import cProfile
        import pstats

        profiler = cProfile.Profile()
        report = profiler.runcall(cpu.run, work, timeout=600)
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(70)
    else:
        report = cpu.run(work, timeout=600)
    print(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=12, help="of each client")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turns")
    parser.add_argument("--one", choices=NAMES, help="measure this one here")
    parser.add_argument("--profile", action="store_true", help="with --one")
    args = parser.parse_args()
    if args.one:
        measure(args.one, args.requests, args.profile)
        return
    print(json.dumps(describe("torch", "numpy")))
    for _ in range(args.rounds):
        for name in NAMES:
            command = [sys.executable, __file__, "--one", name, "--requests", str(args.requests)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for kind, values in json.loads(out).items():
                print(f"{name:8} {kind:26} {json.dumps(values)}", flush=True)


def figures(times: list[float]) -> dict[str, float]:
    values = np.array(times or [0.0])
    names = {"p50_ms": 50, "p99_ms": 99, "max_ms": 100}
    found = {name: round(float(np.percentile(values, at)), 3) for name, at in names.items()}
    return {"ticks": len(times), **found, "sum_ms": round(float(values.sum()), 1)}


if __name__ == "__main__":
    main()
