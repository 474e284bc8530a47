"""What LMDeploy decides on fixed workloads, and its defects, as JSON.

`python -m tests.lmdeploy.recordings` prints them for the tree on PYTHONPATH: the stock one, when a test
asks. Nothing here uses a patch.
"""

import asyncio
import json
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from lmdeploy.pytorch.engine.model_agent import cache_swapping
from lmdeploy.pytorch.messages import MessageStatus

from tests.lmdeploy.cpu import (
    BLOCK,
    add,
    ask,
    blocks_of,
    decode,
    engine,
    next_turn,
    prefill,
    run,
    scheduler,
    stop,
)

SHARED = list(range(100, 100 + 8 * BLOCK))


def everything() -> dict[str, Any]:
    """All recordings."""
    return {
        "engine": {name: record() for name, record in ENGINE.items()},
        "scheduler": [
            scheduler_trace(seed, prefix) for seed in range(4) for prefix in (True, False)
        ],
        "faults": {name: fault() for name, fault in FAULTS.items()},
    }


# The engine's forwards, and the answers.


def _burst() -> Any:
    eng = engine()

    async def work() -> Any:
        return await asyncio.gather(*[ask(eng, i, SHARED + [i] * 20, 24) for i in range(8)])

    return run(work), eng.executor.trace


def _late() -> Any:
    eng = engine(max_batch_size=6)

    async def one(i: int) -> Any:
        for _ in range(7 * i):
            await asyncio.sleep(0)
        return await ask(eng, i, SHARED[: 20 * i + 5], 10 + 9 * i)

    async def work() -> Any:
        return await asyncio.gather(*[one(i) for i in range(8)])

    return run(work), eng.executor.trace


def _long() -> Any:
    eng = engine(max_prefill_token_num=256)

    async def work() -> Any:
        sizes = (300, 100, 100, 90, 700, 10)
        prompts = [[i * 31 + at for at in range(size)] for i, size in enumerate(sizes)]
        return await asyncio.gather(*[ask(eng, i, p, 20) for i, p in enumerate(prompts)])

    return run(work), eng.executor.trace


def _small_pool() -> Any:
    eng = engine(num_gpu_blocks=24, enable_prefix_caching=False)

    async def work() -> Any:
        return await asyncio.gather(*[ask(eng, i, [i] * 60, 90) for i in range(5)])

    return run(work), eng.executor.trace


def _turns() -> Any:
    eng = engine()

    async def talk(i: int) -> Any:
        first = await ask(eng, i, [*SHARED, i], 12, end=False)
        return first, await ask(eng, i, [700 + i] * 21, 12)

    async def work() -> Any:
        return await asyncio.gather(*[talk(i) for i in range(3)])

    return run(work), eng.executor.trace


ENGINE: dict[str, Callable[[], Any]] = {
    "burst": _burst,
    "late": _late,
    "long": _long,
    "small_pool": _small_pool,
    "turns": _turns,
}


def scheduler_trace(seed: int, prefix: bool) -> list[Any]:
    """Random arrivals, forwards, stops, further turns and ends: what ran, in which blocks.

    With prefix caching the pool is large: stock breaks ties of its LRU by memory address.
    """
    rng = random.Random(seed)
    sched = scheduler(blocks=4096 if prefix else 40, batch=5, tokens=200, prefix=prefix)
    seqs: list[Any] = []
    trace: list[Any] = []
    for at in range(120):
        action = rng.choice(("add", "prefill", "decode", "decode", "stop", "turn", "end"))
        if action == "add" and len(sched.sessions) < 9:
            length = rng.randrange(1, 120)
            seqs.append(add(sched, at, [rng.randrange(2)] * 32 + SHARED[:length]))
        elif action == "prefill":
            trace.append(["prefill", [(s.session_id, blocks_of(s)) for s in prefill(sched)]])
        elif action == "decode" and sched.has_running():
            trace.append(["decode", [(s.session_id, blocks_of(s)) for s in decode(sched)]])
        elif action == "stop" and sched.has_running():
            stop(rng.choice(sched.running))
        elif action == "turn" and sched.hanging:
            next_turn(rng.choice(sched.hanging), [rng.randrange(9)] * rng.randrange(1, 40))
        elif action == "end" and sched.hanging:
            sched.end_session(sched.hanging[0].session_id)
        trace.append(sched.block_manager.get_num_free_gpu_blocks())
    return trace


# Defects. Each returns what shows it; `prepare` may set guards.


def _no_guard(sched: Any) -> Any:
    return None


def b1_table(prepare: Callable[[Any], Any] = _no_guard) -> dict[str, Any]:
    """Two sessions have the same conversation; the second one's table after its second turn's match."""
    sched = scheduler()
    prepare(sched)
    prompt = list(range(100, 140))  # two full blocks and a half
    a, b = add(sched, 1, prompt), add(sched, 2, prompt)
    prefill(sched)
    decode(sched)
    stop(a, b)
    turn = list(range(500, 530))
    next_turn(a, turn)
    prefill(sched)
    decode(sched)
    next_turn(b, turn)
    owned = blocks_of(b)
    sched.block_trie.match(b)
    return {
        "owned": owned,
        "table": blocks_of(b),
        "history": b.num_history_ids,
        "right": blocks_of(a),
    }


def b3_clock(prepare: Callable[[Any], Any] = _no_guard) -> dict[str, Any]:
    """Last-use times of two blocks that were used one after the other."""
    sched = scheduler()
    prepare(sched)
    allocator = sched.block_manager.allocator
    first, second = allocator.allocate(1), allocator.allocate(1)
    times = [float(allocator.get_access_time(block)[0]) for block in (first, second)]
    return {"times": times, "whole_seconds": all(time == int(time) for time in times)}


def b4_kept() -> dict[str, Any]:
    """What a sequence holds after it was not admitted."""
    sched = b4_scheduler()
    admitted = sched.schedule(True).running
    waiting = sched.waiting[0]
    return {
        "admitted": len(admitted),
        "blocks": waiting.num_blocks,
        "history": waiting.num_history_ids,
    }


def b4_scheduler() -> Any:
    """A pool that a running sequence nearly fills, and a waiting one that shares its start."""
    sched = scheduler(blocks=8)
    add(sched, 1, list(range(6 * BLOCK + 4)))
    prefill(sched)
    decode(sched)
    add(sched, 2, [*range(3 * BLOCK), *[999] * (4 * BLOCK)])
    return sched


def b5_admitted() -> dict[str, Any]:
    """How many of six cached prompts, eight new tokens each, one prefill of 512 tokens takes."""
    return {"admitted": len(b5_scheduler().schedule(True).running)}


def b5_scheduler() -> Any:
    """Six waiting prompts of 488 tokens, all but eight of them cached; the budget is 512."""
    sched = scheduler(blocks=1000, tokens=512)
    shared = list(range(30 * BLOCK))
    add(sched, 1, shared + [1] * 8)
    prefill(sched)
    decode(sched)
    for session in range(2, 8):
        add(sched, session, shared + [session] * 8)
    return sched


def b6_answer(drive: Callable[[Any], Any] = _no_guard) -> dict[str, Any]:
    """What the client of a sequence hears that outgrows the pool."""
    eng = engine(num_gpu_blocks=8, session_len=10**6, enable_prefix_caching=False)
    eng.max_session_len = 10**6  # as with a session length that was not cut to the pool
    drive(eng)

    async def work() -> Any:
        try:
            return len(await asyncio.wait_for(ask(eng, 1, [5] * 100, 60), timeout=1.0))
        except asyncio.TimeoutError:
            return "nothing"
        except RuntimeError as error:
            return str(error)

    return {
        "answer": run(work),
        "aborted": eng.scheduler.seq_manager.num_sequences(MessageStatus.ABORTED),
    }


def host_table() -> dict[str, Any]:
    """The table of a sequence that was swapped out: host block ids follow those of the GPU."""
    sched = scheduler(blocks=16, host=16, prefix=False)
    seq = add(sched, 1, list(range(70)))
    prefill(sched)
    swapped, _ = sched.block_manager.try_swap_out(seq)
    table = sched.block_manager.get_block_table(seq)
    return {"swapped": swapped, "beyond_gpu": bool((np.array(table) >= 16).any())}


def swap_order() -> list[str]:
    """The order in which a step's copies run."""
    calls: list[str] = []
    cache = types.SimpleNamespace(
        swap_in=lambda _: calls.append("in"),
        swap_out=lambda _: calls.append("out"),
        events=types.SimpleNamespace(wait=lambda: calls.append("wait")),
        cache_stream=types.SimpleNamespace(wait_stream=lambda _: calls.append("sync")),
    )
    cache_swapping(cache, {0: 1}, {1: 0})
    return calls


FAULTS: dict[str, Callable[[], Any]] = {
    "b1": b1_table,
    "b3": b3_clock,
    "b4": b4_kept,
    "b5": b5_admitted,
    "b6": b6_answer,
    "host_table": host_table,
    "swap_order": swap_order,
}


if __name__ == "__main__":
    print(json.dumps(everything(), default=int))
