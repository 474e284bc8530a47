"""One of two workers, as gloo ranks: KV of a prefix goes from rank 0 to rank 1.

`python -m tests.lmdeploy.two_workers RANK FILE` prints JSON; FILE is where the ranks meet.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lmdeploy.pytorch.engine.cache_engine import CacheEngine

from sagellm_ir.runtime.engines.lmdeploy.handover import receive_prefix, send_prefix
from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager
from tests.lmdeploy.cpu import BLOCK, add, blocks_of, prefill, scheduler, stop

PROMPT = list(range(100, 100 + 4 * BLOCK + 6))
LAYERS = 2


def worker(rank: int) -> tuple[Any, KVManager, Any]:
    """A scheduler, and a cache whose blocks hold numbers of their own: layer, worker and block."""
    sched = scheduler(blocks=12, host=8)
    kv = KVManager(sched)
    cache = CacheEngine.__new__(CacheEngine)
    numbers = torch.arange(12.0).reshape(1, 12, 1) + 100 * rank
    cache.full_gpu_cache = tuple(
        (numbers + 1000 * part).repeat(LAYERS, 1, 3).contiguous() for part in range(2)
    )
    return sched, kv, cache


def content(kv: KVManager, cache: Any, blocks: list[int]) -> list[list[float]]:
    """What logical blocks hold, in each part of the cache."""
    where = kv.blocks.allocator.get_physical_blocks(np.array(blocks))
    return [part[1, where, 2].tolist() for part in cache.full_gpu_cache]


def references(kv: KVManager) -> list[int]:
    return [int(count) for count in kv.blocks.allocator._log_mem.ref_count if count]


def main(rank: int, meeting: str) -> dict[str, Any]:
    """What this rank saw."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    sched, kv, cache = worker(rank)
    seen: dict[str, Any] = {}
    if rank == 0:
        seq = add(sched, 1, PROMPT)
        prefill(sched)
        blocks = blocks_of(seq)[:4]
        seen["content"] = content(kv, cache, blocks)
        before = references(kv)
        seen["sent"] = [send_prefix(kv, cache, PROMPT, peer=1) for _ in range(2)]
        stop(seq)
        seen["unknown"] = send_prefix(kv, cache, [7] * BLOCK, peer=1)
        seen["kept"] = references(kv) == before
    else:
        # It computed the first block itself, for another prompt.
        mine = add(sched, 1, [*PROMPT[: BLOCK + 3], 7])
        prefill(sched)
        free = kv.blocks.get_num_free_gpu_blocks()
        seen["came"] = [receive_prefix(kv, cache, PROMPT, peer=0) for _ in range(2)]
        seen["unknown"] = receive_prefix(kv, cache, [7] * BLOCK, peer=0)
        seen["taken"] = free - kv.blocks.get_num_free_gpu_blocks()
        seq = add(sched, 2, PROMPT)
        [ran] = prefill(sched)
        seen["matched"] = ran is seq and seq.num_history_ids - seq.num_token_ids
        blocks = blocks_of(seq)[:4]
        seen["shared"] = blocks[0] == blocks_of(mine)[0]
        seen["content"] = content(kv, cache, blocks)
        info = kv.blocks.get_block_info(blocks)
        seen["references"] = info["ref_count"].tolist()
        for one in (mine, seq):
            stop(one)
            kv.release(one)
        seen["room"] = kv.make_room(12)  # all of it can go again
    dist.destroy_process_group()
    return seen


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
