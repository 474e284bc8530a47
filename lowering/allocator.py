"""`BlockPool`: hands out the physical blocks of one tier of one worker, in contiguous runs.

Free space is kept as maximal runs in power-of-two size classes, each a heap by address: a
segregated fit (M. Masmano et al., "TLSF", ECRTS 2004) that takes the lowest address of the smallest class
that surely fits. A bit mask tells which classes
have runs. Every operation costs O(log runs), and the outcome depends on the calls alone.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import chain

__all__ = ["BlockPool", "Run", "expand", "merged"]

Run = tuple[int, int]
"""First block and number of blocks."""


def expand(runs: Sequence[Run]) -> tuple[int, ...]:
    """The blocks of some runs, in the order of the runs."""
    if len(runs) == 1:
        start, size = runs[0]
        return tuple(range(start, start + size))
    return tuple(chain.from_iterable([range(start, start + size) for start, size in runs]))


def merged(runs: Iterable[Run]) -> list[Run]:
    """Runs in ascending order, neighbours as one."""
    found: list[Run] = []
    stop = -1
    for start, size in sorted(runs):
        if start == stop:
            start, before = found.pop()
            size += before
        found.append((start, size))
        stop = start + size
    return found


class BlockPool:
    """The free blocks among `0 .. capacity - 1`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free_blocks = 0
        self._size_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        # Entries of runs that have merged or shrunk since stay in the heaps until they surface.
        self._classes: list[list[int]] = [[] for _ in range(capacity.bit_length() + 1)]
        self._filled = 0
        """Bit k is set unless class k is known to be empty."""
        if capacity:
            self.free([(0, capacity)])

    def take(self, count: int, near: int = -1) -> list[Run] | None:
        """Allocate `count` blocks, or None when fewer are free.

        They come from the run that starts at `near` if it is long enough, else from one run if
        any surely fits, else from as few large runs as possible, in ascending order.
        """
        if count > self.free_blocks:
            return None
        if not count:
            return []
        start = near
        if self._size_at.get(near, 0) < count:
            fit = self._fit(count)
            if fit is None:
                return self._gather(count)
            start = fit
        self._cut(start, count)
        return [(start, count)]

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
            self._cut(start, size)
        keep = [b for start, size in free for b in range(start, start + size) if b not in wanted]
        self.free(merged((block, 1) for block in keep))

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
        size_class = size.bit_length() - 1
        heappush(self._classes[size_class], start)
        self._filled |= 1 << size_class

    def _cut(self, start: int, count: int) -> None:
        """Allocate the first `count` blocks of the free run at `start`."""
        size = self._size_at.pop(start)
        self.free_blocks -= count
        if size > count:
            self._insert(start + count, size - count)
        else:
            del self._start_before[start + size]

    def _fit(self, count: int) -> int | None:
        """The start of a run of the smallest class whose runs all have `count` blocks."""
        least = (count - 1).bit_length()
        while classes := self._filled >> least:
            # The lowest bit that is set.
            size_class = least + (classes & -classes).bit_length() - 1
            start = self._lowest(size_class)
            if start is not None:
                return start
        return None

    def _lowest(self, size_class: int) -> int | None:
        """The lowest start of a free run of `2**size_class` to `2**(size_class+1) - 1` blocks."""
        heap, size_at = self._classes[size_class], self._size_at
        while heap:
            if size_at.get(heap[0], 0).bit_length() - 1 == size_class:
                return heap[0]
            heappop(heap)
        self._filled &= ~(1 << size_class)
        return None

    def _gather(self, count: int) -> list[Run]:
        """Allocate from the largest runs first; no single run surely fits."""
        runs: list[Run] = []
        while count:
            start = self._lowest(self._filled.bit_length() - 1)
            if start is not None:
                size = min(count, self._size_at[start])
                self._cut(start, size)
                runs.append((start, size))
                count -= size
        runs.sort()
        return runs
