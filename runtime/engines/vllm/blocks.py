"""`BlockLedger`: what a plan says of a worker's blocks, in numbers. The bytes are vLLM's.

Plans number device blocks from 0. vLLM keeps its block 0 for itself, so block `b` of a plan is
vLLM's `b + NULL_BLOCKS`, and a pool of `n` blocks is one of `n + NULL_BLOCKS` to vLLM.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, takewhile

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import Bind, KVFree, KVMove
from sagellm_ir.runtime.backend import CachedPrefix
from sagellm_ir.runtime.engines.tiers import check_blocks, check_move
from sagellm_ir.target import DEVICE

__all__ = ["NULL_BLOCKS", "BlockLedger", "to_engine", "to_plan"]

NULL_BLOCKS = 1
"""Blocks at the start of vLLM's pool that no request may use."""


def to_engine(blocks: Iterable[int]) -> list[int]:
    """The numbers that vLLM has for a plan's device blocks."""
    return [block + NULL_BLOCKS for block in blocks]


def to_plan(blocks: Iterable[int]) -> list[int]:
    """Undo `to_engine`."""
    return [block - NULL_BLOCKS for block in blocks]


class BlockLedger:
    """Tables of requests, and which blocks of each tier hold something. It decides nothing.

    Args:
        worker: the plan's name for this engine.
        capacity: blocks of each tier.
        block_size: tokens of a block.
    """

    def __init__(self, worker: str, capacity: Mapping[str, int], block_size: int) -> None:
        self.worker = worker
        self.capacity = dict(capacity)
        self.block_size = block_size
        self.tables: dict[str, list[int]] = {}
        """A request's device blocks, in a plan's numbers."""
        self.changed: set[str] = set()
        """Requests whose tables are not those of before with blocks behind them."""
        self._held: dict[str, dict[int, int]] = {tier: {} for tier in capacity}
        """By tier and block, a number that is new each time the block starts to hold something."""
        self._bound: dict[str, list[int]] = {}
        """The numbers that a request's blocks had when they were bound."""
        self._fills = 0
        self._found: dict[str, tuple[int, CachedPrefix | None]] = {}
        """What `cached` found for so many full blocks of a request, while no block was freed."""
        self._agreed: set[tuple[int, int, tuple[str, ...]]] = set()
        """What `agree` has found, while tables have only grown."""

    def bind(self, bind: Bind) -> None:
        """Point a request's table at blocks.

        Raises:
            SageIRError: a block out of range, or a hole in the table.
        """
        check_blocks(self.capacity, DEVICE, bind.blocks)
        table = self.tables.setdefault(bind.request, [])
        if not 0 <= bind.at <= len(table):
            raise SageIRError(
                Diagnostic(
                    f"the plan binds block {bind.at} of request {bind.request!r}, whose table has "
                    f"{len(table)} blocks: a table has no holes"
                )
            )
        self._found.pop(bind.request, None)
        stop = bind.at + len(bind.blocks)
        old = table[bind.at : stop]
        if old != list(bind.blocks[: len(old)]):
            self.changed.add(bind.request)
            self._agreed.clear()
        table[bind.at : stop] = bind.blocks
        self._hold(DEVICE, bind.blocks)
        numbers = [self._held[DEVICE][block] for block in bind.blocks]
        self._bound.setdefault(bind.request, [])[bind.at : stop] = numbers

    def move(self, move: KVMove) -> None:
        """Note that blocks are copied.

        Raises:
            SageIRError: an unknown tier or worker, a block out of range, or not one destination a block.
        """
        if move.from_worker not in (None, self.worker):
            raise SageIRError(
                Diagnostic(
                    f"the plan copies KV from worker {move.from_worker!r}; this engine is one "
                    f"worker, {self.worker!r}",
                    help="compile for a target with one worker",
                )
            )
        check_move(move)
        check_blocks(self.capacity, move.from_tier, move.src)
        check_blocks(self.capacity, move.to_tier, move.dst)
        self._hold(move.to_tier, move.dst)

    def free(self, free: KVFree) -> None:
        """Note that blocks hold nothing any more.

        Raises:
            SageIRError: an unknown tier, or a block out of range.
        """
        check_blocks(self.capacity, free.tier, free.blocks)
        self._found.clear()
        for block in free.blocks:
            self._held[free.tier].pop(block, None)

    def table(self, request: str, tokens: int) -> list[int]:
        """A request's blocks, which must have room for this many tokens.

        Raises:
            SageIRError: they have not.
        """
        table = self.tables.get(request, [])
        room = len(table) * self.block_size
        if room < tokens:
            raise SageIRError(
                Diagnostic(
                    f"the plan runs request {request!r} up to token {tokens}, but its blocks on "
                    f"worker {self.worker!r} hold {room}",
                    help="bind blocks before the step that fills them",
                )
            )
        return table

    def agree(self, start: int, stop: int, requests: Sequence[str]) -> bool:
        """Whether the tables of requests have the same blocks for tokens `[start, stop)`."""
        key = start, stop, tuple(requests)
        if key not in self._agreed:
            span = slice(start // self.block_size, -(-stop // self.block_size))
            tables = [self.tables.get(request, [])[span] for request in requests]
            if any(len(t) < span.stop - span.start or t != tables[0] for t in tables):
                return False
            self._agreed.add(key)
        return True

    def release(self, request: str) -> None:
        """Forget a request's table."""
        self.tables.pop(request, None)
        self.changed.discard(request)
        self._bound.pop(request, None)
        self._found.pop(request, None)
        self._agreed.clear()

    def free_blocks(self) -> dict[tuple[str, str], int]:
        """Blocks that hold nothing, by (worker, tier)."""
        return {
            (self.worker, tier): self.capacity[tier] - len(held)
            for tier, held in self._held.items()
        }

    def cached(self, request: str, tokens: int) -> CachedPrefix | None:
        """The request's first full blocks that still hold the KV of its first `tokens` tokens."""
        full = tokens // self.block_size
        if request not in self._found or self._found[request][0] != full:
            self._found[request] = full, self._cached(request, full)
        return self._found[request][1]

    def _cached(self, request: str, full: int) -> CachedPrefix | None:
        held = self._held[DEVICE]
        pairs = zip(self.tables.get(request, ()), self._bound.get(request, ()), strict=True)
        still = takewhile(lambda pair: held.get(pair[0]) == pair[1], islice(pairs, full))
        kept = tuple(block for block, _ in still)
        return CachedPrefix(request, DEVICE, self.worker, kept) if kept else None

    def _hold(self, tier: str, blocks: Sequence[int]) -> None:
        held = self._held[tier]
        for block in blocks:
            if block not in held:
                self._fills += 1
                held[block] = self._fills
