"""One configuration of `lmdeploy_e2e.py`, in a process of its own: an engine, and rows through it."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lmdeploy_rows import ROWS, WARM_UP, Client
from ticks import Ticks

CONFIG: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_batch_size": 256,
    "block_size": 64,
    "enable_prefix_caching": True,
    "max_prefill_token_num": 8192,
}


def build(task: dict[str, Any]) -> Any:
    """The engine: LMDeploy's on the model, or the tests' on a CPU."""
    if task["smoke"]:
        from tests.lmdeploy import cpu

        return cpu.engine(**CONFIG, num_gpu_blocks=12000, session_len=131072, device_type="cuda")
    from lmdeploy.messages import PytorchEngineConfig
    from lmdeploy.pytorch.engine import Engine

    config = PytorchEngineConfig(**CONFIG, cache_max_entry_count=task["cache"])
    return Engine.from_pretrained(task["model"], config)


async def work(task: dict[str, Any]) -> None:
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
        await WARM_UP.run(client)
        await asyncio.sleep(0.2)
        for number in task["rows"]:
            ticks.take()
            driver = getattr(engine.scheduler, "plan_source", None)
            try:
                run = await asyncio.wait_for(ROWS[number].run(client), task["row_seconds"])
            except (asyncio.TimeoutError, RuntimeError) as error:
                say(file, {"row": ROWS[number].name, "failed": repr(error), **state(engine)})
                return  # what is left in the engine would be in the next row's way
            entry = {"row": ROWS[number].name, **run.figures(), **ticks.take()}
            if driver is not None:
                entry |= {"unplanned": driver.unplanned, "rejected": driver.rejected[-3:]}
                entry["epochs"] = driver.source.planner.epochs
            say(file, {**entry, "tokens": {a.name: a.tokens for a in run.answers}})
            await asyncio.sleep(0.2)


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
