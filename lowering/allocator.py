"""`BlockPool`: hands out the physical blocks of one tier of one worker, neighbours where it can."""

from collections.abc import Collection
from itertools import chain

__all__ = ["BlockPool"]


class BlockPool:
    """The free blocks among `0 .. capacity - 1`.

    Blocks come out in ascending order, so what is taken in one go, or one after the other, lies in
    few runs. Blocks that come back wait until the sorted ones run short, and are sorted in then,
    which costs each block O(log blocks) at most. Blocks that were never used come last, so a plan
    touches no more of the pool than it must. The outcome depends on the calls alone.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free_blocks = capacity
        self._sorted: list[int] = []
        """Descending: the next block stands last."""
        self._returned: list[int] = []
        self._unused = 0
        """The first block that was never handed out; so are all after it."""

    def take(self, count: int) -> tuple[int, ...] | None:
        """Allocate `count` blocks, ascending, or None when fewer are free.

        Used ones if there are enough, else neighbours that were never used, else what is left of
        both.
        """
        if count > self.free_blocks:
            return None
        self.free_blocks -= count
        ready = self._sorted
        if len(ready) < count and self._returned:
            ready += self._returned
            ready.sort(reverse=True)
            self._returned.clear()
        if len(ready) >= count:
            taken = tuple(ready[: -count - 1 : -1])
            del ready[len(ready) - count :]
            return taken
        old = len(ready) if self.capacity - self._unused < count else 0
        taken = tuple(ready[: -old - 1 : -1])
        del ready[len(ready) - old :]
        fresh = range(self._unused, self._unused + count - old)
        self._unused += count - old
        return (*taken, *fresh)

    def free(self, blocks: Collection[int]) -> None:
        """Give blocks back."""
        self._returned += blocks
        self.free_blocks += len(blocks)

    def reserve(self, blocks: Collection[int]) -> None:
        """Take these very blocks.

        Raises:
            ValueError: a block is not free.
        """
        wanted = set(blocks)
        unused = min(max(self._unused, max(wanted, default=-1) + 1), self.capacity)
        free = chain(self._sorted, self._returned, range(self._unused, unused))
        kept = [block for block in free if block not in wanted]
        left = self.free_blocks - len(blocks)
        if len(kept) + self.capacity - unused != left:
            raise ValueError("a reserved block is outside the tier, or reserved twice")
        self._sorted, self._returned, self._unused, self.free_blocks = [], kept, unused, left
