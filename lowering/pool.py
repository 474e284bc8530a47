"""`Pool`: one tier of one worker while a graph is lowered: its free blocks and its cached content."""

from collections.abc import Collection
from itertools import islice

from sagellm_ir.lowering.allocator import BlockPool

__all__ = ["Pool"]


class Pool(BlockPool):
    """Blocks are free, held by a value, or cached: pinned while a later fetch or a value needs
    them, else idle, and given back when their space is needed."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.block_of: dict[int, int] = {}
        """Cached content: where each id is."""
        self.pins: dict[int, int] = {}
        self.idle: dict[int, None] = {}
        """Cached ids without a pin, least recently used first."""
        self.freed: list[int] = []
        """Given back since the last `Pools.take_frees`."""

    def pin(self, content: int) -> None:
        """Keep cached content until as many `unpin`s."""
        self.idle.pop(content, None)
        self.pins[content] = self.pins.get(content, 0) + 1

    def unpin(self, content: int) -> None:
        """Undo one `pin`."""
        if self.pins[content] > 1:
            self.pins[content] -= 1
        else:
            del self.pins[content]
            self.idle[content] = None

    def give(self, blocks: Collection[int]) -> None:
        """Give blocks back."""
        self.free(blocks)
        self.freed += blocks

    def take(self, count: int) -> tuple[int, ...] | None:
        """Take blocks, or None if too few are free; drop as much idle content as that needs."""
        if count > self.free_blocks:
            short = count - self.free_blocks
            if short > len(self.idle):
                return None
            dropped = list(islice(self.idle, short))
            for content in dropped:
                del self.idle[content]
            self.give([self.block_of.pop(content) for content in dropped])
        return super().take(count)

    def keep(self, content: int, block: int) -> None:
        """Cache what a dead block holds, or touch the copy there is and give this one back."""
        if content not in self.block_of:
            self.block_of[content] = block
            self.idle[content] = None
            return
        self.give((block,))
        if content in self.idle:
            del self.idle[content]
            self.idle[content] = None

    def content(self) -> tuple[int, ...]:
        """The ids of what is cached, pinned content last."""
        return (*self.idle, *(content for content in self.block_of if content not in self.idle))
