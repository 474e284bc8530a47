"""`KVPolicy`: which idle KV value leaves a full tier first. `Victims`: the candidates, in order."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from heapq import heappop, heappush
from typing import ClassVar, Generic, TypeVar

from attrs import define

__all__ = ["Entry", "KVPolicy", "Victims"]


@define
class Entry:
    """What a policy may look at: the record of one resident value (or block).

    Times are any clock that only grows: steps of a schedule, requests of a trace.
    """

    size: int = 1
    """Blocks that its eviction frees."""
    cost: float = 1.0
    """What it takes to have it again, in seconds."""
    inserted: int = 0
    """When it became resident."""
    used: int = 0
    """When it was last used."""
    uses: int = 0
    """How often it was used since it became resident."""
    next_use: float = math.inf
    """When it is used next, where the future is known; infinity: never, or unknown."""


class KVPolicy(ABC):
    """Ranks victims. Make one object for each tier and run: a policy may keep state.

    A rank is computed when a value becomes a candidate (idle, and no resident value builds on it)
    and stands until it is used again.
    """

    name: ClassVar[str]
    """As it is written in `evict{policy=...}`."""
    bypass: ClassVar[bool] = False
    """Whether a newcomer of lower rank than every candidate is better not kept at all."""

    @abstractmethod
    def rank(self, entry: Entry) -> tuple[float, ...]:
        """The lowest rank is evicted first."""

    def evicted(self, rank: tuple[float, ...]) -> None:
        """Told after an eviction, with the rank of the victim. Does nothing by default."""
        del rank


Key = TypeVar("Key", bound=Hashable)


class Victims(Generic[Key]):
    """Candidates for eviction: a heap whose stale items are skipped when they surface.

    Equal ranks leave in the order of their keys, so that runs repeat.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Key]] = []
        self._rank: dict[Key, tuple[float, ...]] = {}

    def __len__(self) -> int:
        return len(self._rank)

    def offer(self, key: Key, rank: tuple[float, ...]) -> None:
        """Makes `key` a candidate, or changes its rank."""
        self._rank[key] = rank
        heappush(self._heap, (rank, key))

    def withdraw(self, key: Key) -> None:
        """`key` is no candidate any more; nothing happens if it was none."""
        self._rank.pop(key, None)

    def first(self) -> tuple[tuple[float, ...], Key] | None:
        """The candidate of lowest rank, left in place; None when there is none."""
        heap = self._heap
        while heap and self._rank.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        return heap[0] if heap else None

    def pop(self) -> tuple[tuple[float, ...], Key] | None:
        """Takes the candidate of lowest rank out; None when there is none."""
        found = self.first()
        if found is not None:
            heappop(self._heap)
            del self._rank[found[1]]
        return found
