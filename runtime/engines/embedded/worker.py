"""One worker's memory: its pool, its block tables, and which blocks hold something."""

from itertools import islice

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import Bind, KVFree
from sagellm_ir.runtime.backend import CachedPrefix
from sagellm_ir.runtime.engines.embedded.pool import BlockTable, KVPool
from sagellm_ir.target import DEVICE

__all__ = ["WorkerMemory"]


class WorkerMemory:
    """Tiers of one worker. It decides nothing: plans say which block is used for what."""

    def __init__(self, name: str, pool: KVPool) -> None:
        self.name = name
        self.pool = pool
        self.tables: dict[str, BlockTable] = {}
        self._held: dict[str, dict[int, int]] = {tier: {} for tier in pool.capacity}
        """By tier and block, a number that is new each time the block starts to hold something."""
        self._bound: dict[str, list[int]] = {}
        """The numbers that a request's blocks had when they were bound."""
        self._fills = 0

    def bind(self, bind: Bind) -> None:
        """Point a request's table at blocks."""
        self.pool.check(DEVICE, bind.blocks)
        table = self.tables.setdefault(bind.request, BlockTable(self.pool.block_size))
        if not 0 <= bind.at <= len(table.blocks):
            raise SageIRError(
                Diagnostic(
                    f"the plan binds block {bind.at} of request {bind.request!r}, whose table has "
                    f"{len(table.blocks)} blocks: a table has no holes"
                )
            )
        table.bind(bind.at, bind.blocks)
        self.hold(DEVICE, bind.blocks)
        numbers = [self._held[DEVICE][block] for block in bind.blocks]
        self._bound.setdefault(bind.request, [])[bind.at : bind.at + len(numbers)] = numbers

    def table(self, request: str, tokens: int) -> BlockTable:
        """The request's table, which must have room for this many tokens."""
        table = self.tables.get(request)
        if table is None or table.capacity < tokens:
            room = table.capacity if table else 0
            raise SageIRError(
                Diagnostic(
                    f"the plan runs request {request!r} up to token {tokens}, but its blocks on "
                    f"worker {self.name!r} hold {room}",
                    help="bind blocks before the step that fills them",
                )
            )
        return table

    def hold(self, tier: str, blocks: tuple[int, ...]) -> None:
        """Note that blocks hold KV."""
        self.pool.check(tier, blocks)
        for block in blocks:
            if block not in self._held[tier]:
                self._fills += 1
                self._held[tier][block] = self._fills

    def free(self, free: KVFree) -> None:
        """Note that blocks hold nothing any more. Their bytes stay until they are overwritten."""
        self.pool.check(free.tier, free.blocks)
        for block in free.blocks:
            self._held[free.tier].pop(block, None)

    def release(self, request: str) -> None:
        """Forget a request's table."""
        self.tables.pop(request, None)
        self._bound.pop(request, None)

    def free_blocks(self) -> dict[tuple[str, str], int]:
        """Blocks that hold nothing, by (worker, tier)."""
        return {
            (self.name, tier): self.pool.capacity[tier] - len(held)
            for tier, held in self._held.items()
        }

    def cached(self, request: str, tokens: int) -> CachedPrefix | None:
        """The request's first full blocks that still hold the KV of its first `tokens` tokens."""
        full = tokens // self.pool.block_size
        kept = []
        if request in self.tables:
            pairs = zip(self.tables[request].blocks, self._bound[request], strict=True)
            for block, number in islice(pairs, full):
                if self._held[DEVICE].get(block) != number:
                    break
                kept.append(block)
        return CachedPrefix(request, DEVICE, self.name, tuple(kept)) if kept else None
