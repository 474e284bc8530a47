"""Random conversations as trace prompts: what `compile.py` scales up, shaped like a chat service.

A third of the requests continue an earlier conversation (their prompt is an earlier prompt plus
new blocks); lengths are log-normal. Means and shares are near those of the Mooncake conversation
trace (R. Qin et al., arXiv 2407.00079): 12k prompt tokens, 340 new tokens, 37 % of blocks seen before.
How many requests lie between a turn and the one it continues is the trace's, too (median 420, 95 %
under 2,200; log-normal): a conversation goes on within minutes, however long the workload is.
"""

import numpy as np

from sagellm_ir.request import Request, TracePrompt

__all__ = ["conversations"]


def conversations(count: int, *, seed: int, block_size: int = 512) -> list[Request]:
    """`count` requests in arrival order; equal seeds give equal requests."""
    rng = np.random.default_rng(seed)
    fresh = np.minimum(rng.lognormal(9.0, 0.9, count), 100_000).astype(int) + 1
    output = np.minimum(rng.lognormal(5.3, 0.9, count), 2_000).astype(int) + 1
    continues = rng.random(count) < 0.35
    parent = np.maximum(np.arange(count) - rng.lognormal(np.log(420), 1.0, count), 0).astype(int)
    next_block = 1
    prompts: list[TracePrompt] = []
    requests = []
    for index in range(count):
        shared: tuple[int, ...] = (0,)
        tokens = int(fresh[index])
        if continues[index] and index:
            earlier = prompts[parent[index]]
            shared = earlier.blocks[: earlier.length // block_size] or shared
            tokens = min(tokens, 4_000)
        length = min(len(shared) * block_size + tokens, 120_000)
        blocks = -(-length // block_size)
        new = max(blocks - len(shared), 0)
        prompt = TracePrompt(
            (*shared[:blocks], *range(next_block, next_block + new)), length, block_size
        )
        next_block += new
        prompts.append(prompt)
        requests.append(
            Request(
                f"r{index}",
                prompt=prompt,
                max_new_tokens=int(output[index]),
                arrival=index * 0.3,
            )
        )
    return requests
