"""`Ledger`: what every block of an engine holds, from epoch to epoch of the online planner.

A change costs what it touches, whatever else the tiers hold.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from sagellm_ir.cost import CostModel
from sagellm_ir.lowering.allocator import BlockPool
from sagellm_ir.lowering.plan import KVFree, KVMove
from sagellm_ir.target import DEVICE, HOST, Target, Tier

__all__ = ["Ledger", "Shelf"]


class Shelf:
    """One tier. A block is free, held (by tables, or by the plan in force), or cached: nobody holds
    it, and it holds known content. Cached blocks give way when space is needed, least recently
    used first.

    Args:
        blocks: the tier's capacity.
    """

    def __init__(self, blocks: int) -> None:
        self._pool = BlockPool(blocks)
        self.block_of: dict[int, int] = {}
        """By content id: the block that holds it, held or cached."""
        self.content_of: list[int | None] = [None] * blocks
        """By block."""
        self._holders = [0] * blocks
        """By block."""
        self._idle: dict[int, None] = {}
        """Cached content, least recently used first."""
        self.freed: list[int] = []
        """Blocks given back since the engine was told last."""
        self.evicted = 0
        """Cached blocks that gave way to new content so far."""
        self.below: Shelf | None = None
        """Where what gives way is kept."""
        self.spilled: list[tuple[int, int]] = []
        """Blocks that gave way, and where below they are to be copied, since the engine was told last."""

    @property
    def room(self) -> int:
        """Blocks that can be had."""
        return self._pool.free_blocks + len(self._idle)

    def take(self, count: int) -> tuple[int, ...]:
        """Blocks for new content, held once. The caller has looked at `room`."""
        if count > self._pool.free_blocks:
            self._evict(count - self._pool.free_blocks)
        taken = self._pool.take(count)
        assert taken is not None, f"{count} blocks wanted, {self._pool.free_blocks} are free"
        holders = self._holders
        for block in taken:
            holders[block] = 1
        return taken

    def hold(self, blocks: Iterable[int], times: int = 1) -> None:
        """Hold blocks once more (or some times), or cached ones for the first time."""
        holders = self._holders
        for block in blocks:
            if not holders[block]:
                content = self.content_of[block]
                assert content is not None, f"block {block} is free"
                del self._idle[content]
            holders[block] += times

    def drop(self, blocks: Sequence[int]) -> None:
        """Undo one `hold` or `take` of each; of a chain, what comes last gives way first."""
        holders = self._holders
        for block in reversed(blocks):
            count = holders[block] = holders[block] - 1
            assert count >= 0, f"nobody holds block {block}"
            if count:
                continue
            content = self.content_of[block]
            if content is None:
                self._free(block)
            else:
                self._idle[content] = None

    def write(self, blocks: Iterable[int], contents: Iterable[int]) -> None:
        """Held blocks hold this content now, as far as both go. Of two blocks with equal content one
        is known."""
        block_of, content_of = self.block_of, self.content_of
        for block, content in zip(blocks, contents, strict=False):
            if content_of[block] is None and content not in block_of:
                block_of[content] = block
                content_of[block] = content

    def forget(self, contents: Iterable[int]) -> None:
        """Content that nobody can ask for again."""
        for content in contents:
            block = self.block_of.pop(content, None)
            if block is not None:
                self.content_of[block] = None
                if content in self._idle:
                    del self._idle[content]
                    self._free(block)

    def idle(self, content: int) -> bool:
        """Whether content is cached and nobody holds it."""
        return content in self._idle

    def _evict(self, count: int) -> None:
        """Let cached blocks give way."""
        for content in list(islice(self._idle, count)):
            del self._idle[content]
            self.evicted += 1
            block = self.block_of.pop(content)
            self.content_of[block] = None
            place = None if self.below is None else self.below._keep(content)
            if place is not None:
                self.spilled.append((block, place))
            self._free(block)

    def _keep(self, content: int) -> int | None:
        """A block to copy content to; None: it is here, or there is no room."""
        if content in self._idle:
            self._idle[content] = self._idle.pop(content)
        if content in self.block_of or not self.room:
            return None
        place = self.take(1)
        self.write(place, (content,))
        self.drop(place)
        return place[0]

    def _free(self, block: int) -> None:
        self._pool.free((block,))
        self.freed.append(block)


class Ledger(dict[str, Shelf]):
    """The shelf of each tier of one worker.

    Args:
        target: has the tiers.
        spill: keep what gives way on the device in the host tier, where a copy there and back takes
            less time than computing it again.
    """

    def __init__(self, target: Target, spill: bool = False) -> None:
        super().__init__((tier.name, Shelf(tier.blocks)) for tier in target.tiers)
        host = target.tier(HOST)
        if spill and host is not None and _pays(target, host):
            self[DEVICE].below = self[HOST]

    def take_changes(self) -> tuple[KVFree | KVMove, ...]:
        """What was given back and spilled since the last call, for the engine, in this order."""
        changes: list[KVFree | KVMove] = []
        for tier, shelf in reversed(self.items()):  # room below is made before it is filled
            if shelf.spilled:
                src, dst = zip(*shelf.spilled, strict=True)
                changes.append(KVMove(tier, HOST, src, dst))
                shelf.spilled.clear()
            if shelf.freed:
                changes.append(KVFree(tier, tuple(shelf.freed)))
                shelf.freed.clear()
        return tuple(changes)


def _pays(target: Target, host: Tier) -> bool:
    """Whether to fetch a block costs less than to compute it."""
    copies = 2 * target.block_bytes / target.tp / host.bandwidth
    return copies < CostModel(target).saved(0, target.block_size)
