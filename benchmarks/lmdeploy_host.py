"""What the host spends on LMDeploy's warm rows: stock, and patched without a plan.

    make build/lmdeploy/.ready && python benchmarks/lmdeploy_host.py --rounds 6

The genuine engine on a CPU over the tests' executor, whose forwards cost nothing here; rows of
`gpu/lmdeploy_rows.py` whose prefix is in the trie. CPU seconds from the first request to the last token:
requests, scheduling, the engine's loop, answers. On a GPU the forwards come on top, which are the same on
both sides. Stock and patched take turns, in a process each.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "gpu")]

import numpy as np  # noqa: E402
from machine import describe  # noqa: E402

from tests.lmdeploy import trees  # noqa: E402

SIDES = ("stock", "patched")
WARM = (2, 4, 6)
"""Rows that ask for their prefix before the clock starts."""
BLOCKS = 28_643
"""Of the pool: what an H200 had beside the model."""


async def run(repetitions: int) -> dict[str, list[float]]:
    """CPU seconds by row, of each repetition after one that is not counted."""
    from lmdeploy_rows import ROWS, Client
    from lmdeploy_worker import CONFIG

    from tests.lmdeploy import cpu

    engine = cpu.engine(**CONFIG, num_gpu_blocks=BLOCKS, session_len=131_072, device_type="cuda")
    engine.executor._forward = lambda tables, starts, rows: np.full(len(rows), 11)
    engine.start_loop()
    client = Client(engine)
    found: dict[str, list[float]] = {}
    for row in (ROWS[number] for number in WARM):
        for repetition in range(repetitions + 1):
            client.rng = np.random.default_rng((row.seed, repetition))
            client.repetition = repetition
            assert row.before is not None
            await client.ask("before", row.before(client), 2)
            work = row.make(client)
            began = time.process_time()
            await work(client)
            if repetition:
                found.setdefault(row.name, []).append(time.process_time() - began)
    return found


def measure(side: str, repetitions: int) -> None:
    """One process: print the seconds of one side."""
    if not trees.prepare():
        sys.exit("LMDeploy is not here; 'make build/lmdeploy/.ready' brings it")
    if side == "stock":
        sys.path.insert(0, str(trees.STOCK))
    print(json.dumps(asyncio.run(run(repetitions))), flush=True)
    os._exit(0)  # LMDeploy's loop has no end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="processes of each side, in turns")
    parser.add_argument("--repetitions", type=int, default=3, help="of a row in a process")
    parser.add_argument("--one", choices=SIDES, help="measure this side here")
    args = parser.parse_args()
    if args.one:
        measure(args.one, args.repetitions)
        return
    print(json.dumps(describe("torch", "numpy")))
    seconds: dict[str, dict[str, list[float]]] = {}
    for turn in range(args.rounds):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            command = [sys.executable, __file__, "--one", side]
            command += ["--repetitions", str(args.repetitions)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for row, times in json.loads(out.splitlines()[-1]).items():
                seconds.setdefault(row, {}).setdefault(side, []).extend(times)
    for row, sides in seconds.items():
        print(row, *(text(side, sides[side]) for side in SIDES), ratio(sides), sep="  ")


def text(side: str, times: list[float]) -> str:
    return f"{side} {statistics.median(times):.4f} ({min(times):.4f} to {max(times):.4f}) s"


def ratio(sides: dict[str, Any]) -> str:
    stock, patched = (statistics.median(sides[side]) for side in SIDES)
    return f"ratio {patched / stock:.3f}, {(patched - stock) * 1e3:+.1f} ms"


if __name__ == "__main__":
    main()
