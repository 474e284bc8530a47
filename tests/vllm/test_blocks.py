"""`BlockLedger` remembers what `cached` and `agree` found: it must be what they would find."""

import random
from copy import deepcopy

from sagellm_ir.lowering.plan import Bind, KVFree, KVMove
from sagellm_ir.runtime.engines.vllm.blocks import BlockLedger
from sagellm_ir.target import DEVICE, HOST

BLOCKS, SIZE = 12, 4


def test_cached_prefixes_after_random_changes() -> None:
    assert sum(map(run, range(20))), "no prefix was cut by a freed block"


def run(seed: int) -> int:
    """Sixty changes; the prefixes that were shorter than the table."""
    rng = random.Random(seed)
    ledger = BlockLedger("w0", {DEVICE: BLOCKS, HOST: BLOCKS}, SIZE)
    cut = 0
    for _ in range(60):
        name = f"r{rng.randrange(3)}"
        blocks = tuple(rng.sample(range(BLOCKS), rng.randrange(1, 4)))
        blocks = rng.choice((blocks, (0, 1)))
        match rng.randrange(5):
            case 0 | 1:
                known = len(ledger.tables.get(name, ()))
                ledger.bind(Bind(name, rng.randint(0, known), blocks))
            case 2:
                ledger.free(KVFree(rng.choice((DEVICE, HOST)), blocks))
            case 3:
                ledger.move(KVMove(DEVICE, DEVICE, blocks, blocks[::-1]))
            case _:
                ledger.release(name)
        for request in ("r0", "r1", "r2"):
            tokens = rng.randrange(BLOCKS * SIZE)
            fresh = deepcopy(ledger)
            fresh._found.clear()
            found = ledger.cached(request, tokens)
            assert found == fresh.cached(request, tokens) == ledger.cached(request, tokens)
            spans = [ledger.tables.get(name, [])[:2] for name in ("r0", request)]
            whole = len(spans[0]) == 2 and spans[0] == spans[1]
            assert ledger.agree(0, 2 * SIZE, ("r0", request)) == whole
            full = min(len(ledger.tables.get(request, ())), tokens // SIZE)
            cut += full > (len(found.blocks) if found else 0)
    return cut
