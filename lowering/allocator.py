"""`BlockPool`: hands out the physical blocks of one tier of one worker, in contiguous runs.

Free space is kept as maximal runs in power-of-two size classes, each a heap by address: a
segregated fit (M. Masmano et al., "TLSF", ECRTS 2004) that takes the lowest address of the smallest class
that surely fits. Every operation costs O(log runs) and the outcome depends on the calls alone.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

__all__ = ["BlockPool", "expand", "runs_of"]

Run = tuple[int, int]
"""First block and number of blocks."""


def expand(runs: Sequence[Run]) -> tuple[int, ...]:
    """The blocks of some runs, in the order of the runs."""
    if len(runs) == 1:
        start, size = runs[0]
        return tuple(range(start, start + size))
    return tuple(block for start, size in runs for block in range(start, start + size))


def runs_of(blocks: Iterable[int]) -> list[Run]:
    """Blocks as runs of consecutive numbers, in their order."""
    runs: list[Run] = []
    for block in blocks:
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


class BlockPool:
    """The free blocks among `0 .. capacity - 1`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free_blocks = 0
        self._size_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        # Entries of runs that have merged or shrunk since stay in the heaps until they surface.
        self._classes: list[list[int]] = [[] for _ in range(capacity.bit_length() + 1)]
        if capacity:
            self.free([(0, capacity)])

    def take(self, count: int, near: int = -1) -> list[Run] | None:
        """Allocate `count` blocks, or None when fewer are free.

        They come from the run that starts at `near` if it is long enough, else from one run if
        any surely fits, else from as few large runs as possible, in ascending order.
        """
        if count > self.free_blocks:
            return None
        if count == 0:
            return []
        if self._size_at.get(near, 0) >= count:
            return [self._cut(near, count)]
        for size_class in range((count - 1).bit_length(), len(self._classes)):
            start = self._lowest(size_class)
            if start is not None:
                return [self._cut(start, count)]
        return self._gather(count)

    def reserve(self, blocks: Iterable[int]) -> None:
        """Take these very blocks.

        Raises:
            ValueError: a block is not free.
        """
        wanted = set(blocks)
        free = sorted(self._size_at.items())
        inside = sum(1 for start, size in free for b in range(start, start + size) if b in wanted)
        if inside != len(wanted):
            raise ValueError("a reserved block is outside the tier, or reserved twice")
        for start, size in free:
            self._remove(start, size)
        keep = [b for start, size in free for b in range(start, start + size) if b not in wanted]
        self.free(runs_of(keep))

    def free(self, runs: Iterable[Run]) -> None:
        """Give runs back; neighbours merge."""
        size_at, start_before = self._size_at, self._start_before
        for start, size in runs:
            self.free_blocks += size
            stop = start + size
            if after := size_at.pop(stop, 0):
                stop += after
            before = start_before.pop(start, None)
            if before is not None:
                del size_at[before]
                start = before
            self._insert(start, stop - start)

    def _insert(self, start: int, size: int) -> None:
        self._size_at[start] = size
        self._start_before[start + size] = start
        heappush(self._classes[size.bit_length() - 1], start)

    def _remove(self, start: int, size: int) -> None:
        del self._size_at[start]
        del self._start_before[start + size]
        self.free_blocks -= size

    def _cut(self, start: int, count: int) -> Run:
        """Allocate the first `count` blocks of the free run at `start`."""
        size = self._size_at[start]
        self._remove(start, size)
        if size > count:
            self._insert(start + count, size - count)
            self.free_blocks += size - count
        return start, count

    def _lowest(self, size_class: int) -> int | None:
        """The lowest start of a free run of `2**size_class` to `2**(size_class+1) - 1` blocks."""
        heap = self._classes[size_class]
        while heap:
            if self._size_at.get(heap[0], 0).bit_length() - 1 == size_class:
                return heap[0]
            heappop(heap)
        return None

    def _gather(self, count: int) -> list[Run]:
        """Allocate from the largest runs first; no single run surely fits."""
        runs: list[Run] = []
        size_class = (count - 1).bit_length()
        while count:
            start = self._lowest(size_class)
            if start is None:
                size_class -= 1
                continue
            run = self._cut(start, min(count, self._size_at[start]))
            runs.append(run)
            count -= run[1]
        return sorted(runs)
