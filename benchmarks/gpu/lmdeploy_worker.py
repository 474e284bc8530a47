"""One configuration of `lmdeploy_e2e.py`, in a process of its own: an engine, and rows through it."""

import asyncio
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

from lmdeploy_rows import KERNELS_WARM_UP, ROWS, WARM_UP, Client, Row
from ticks import Ticks

Task = dict[str, Any]

CONFIG: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_batch_size": 256,
    "block_size": 64,
    "enable_prefix_caching": True,
    "max_prefill_token_num": 8192,
}


def build(task: Task) -> Any:
    """The engine: LMDeploy's on the model, or the tests' on a CPU."""
    if task["smoke"]:
        from tests.lmdeploy import cpu

        return cpu.engine(**CONFIG, num_gpu_blocks=12000, session_len=131072, device_type="cuda")
    import lmdeploy.pytorch.engine.engine as engine_module
    from lmdeploy.messages import PytorchEngineConfig
    from lmdeploy.pytorch.engine import Engine

    # It starts a process to look at the environment: seconds, and nothing of what is measured.
    engine_module.EngineChecker = lambda **_: types.SimpleNamespace(handle=lambda: None)
    cache = {"cache_max_entry_count": task["cache"], "logprobs_mode": "raw_logits"}
    config = PytorchEngineConfig(**CONFIG, **cache)
    return Engine.from_pretrained(task["model"], config)


async def work(task: Task) -> None:
    began = time.perf_counter()
    engine = build(task)
    engine.start_loop()
    client, ticks = Client(engine), Ticks(engine)
    start = {
        "row": "start",
        "seconds": round(time.perf_counter() - began, 1),
        "blocks": engine.cache_config.num_gpu_blocks,
        "budget": engine.cache_config.max_prefill_token_num,
    }
    with Path(task["results"]).open("a") as file:
        say(file, start)
        warm = time.perf_counter()
        for row in (*WARM_UP, *(KERNELS_WARM_UP if "kernels" in task["config"] else ())):
            await row.run(client)
        await asyncio.sleep(0.2)
        say(file, {"row": "warm-up", "seconds": round(time.perf_counter() - warm, 1)})
        for number, repetitions in task["rows"]:
            if not await measure(engine, client, ticks, task, ROWS[number], repetitions, file):
                return  # what is left in the engine would be in the next row's way


async def measure(
    engine: Any, client: Client, ticks: Ticks, task: Task, row: Row, repetitions: int, file: Any
) -> bool:
    """Run a row and say its figures: of the repetition with the median wall time. False: it failed."""
    driver = getattr(engine.scheduler, "plan_source", None)
    ticks.take()
    entries: list[Task] = []
    tokens: dict[str, list[int]] = {}
    for repetition in range(repetitions):
        try:
            run = await asyncio.wait_for(row.run(client, repetition), task["row_seconds"])
        except (asyncio.TimeoutError, RuntimeError) as error:
            say(file, {"row": row.name, "failed": repr(error), **state(engine)})
            return False
        entries.append({"row": row.name, **run.figures(), **ticks.take()})
        if repetition == 0:
            tokens = {answer.name: answer.tokens for answer in run.answers}
        await asyncio.sleep(0.2)
    walls = [each["wall_s"] for each in entries]
    entries.sort(key=lambda entry: entry["wall_s"])
    entry = entries[repetitions // 2] | {"walls_s": walls}
    if driver is not None:
        entry |= {"unplanned": driver.unplanned, "rejected": driver.rejected[-3:]}
        entry["epochs"] = driver.source.planner.epochs
    say(file, {**entry, "tokens": tokens})
    if task["judge"] and row.prompts is not None:
        await judge(client, row, tokens, task["judge"], file)
    return True


async def judge(client: Client, row: Any, tokens: Any, others: list[str], file: Any) -> None:
    """Look at where the answers of configurations that ran before part from these."""
    for other in map(Path, others):
        for entry in map(json.loads, other.read_text().splitlines()):
            if entry["row"] == row.name and "tokens" in entry:
                found = await row.judge(client, tokens, entry["tokens"])
                say(file, {"row": f"{row.name}: {other.stem} parts", **found})


def state(engine: Any) -> dict[str, Any]:
    """Where the sequences of an engine that does not answer are."""
    scheduler = engine.scheduler
    driver = getattr(scheduler, "plan_source", None)
    counts = {
        "waiting": scheduler.num_waiting(),
        "running": scheduler.num_running(),
        "in_flight": scheduler.num_locked(),
        "free_blocks": int(scheduler.block_manager.get_num_free_gpu_blocks()),
    }
    return counts | ({} if driver is None else {"rejected": driver.rejected[-5:]})


def say(file: Any, entry: dict[str, Any]) -> None:
    """Keep an entry, and print it without its tokens."""
    file.write(json.dumps(entry) + "\n")
    file.flush()
    print({key: value for key, value in entry.items() if key != "tokens"}, flush=True)


if __name__ == "__main__":
    asyncio.run(work(json.loads(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # LMDeploy's loop has no end
