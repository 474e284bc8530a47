"""Greedy-Dual-Size-Frequency: evict what is cheapest to have again, for its size and use.

L. Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy",
HP Laboratories report HPL-98-69R1, 1998: H = L + uses x cost / size, where the clock L is the H
of the last victim, so that what is not used ages.
"""

from typing import ClassVar

from sagellm_ir.passes.kv_policy.base import Entry, KVPolicy

__all__ = ["Cost"]


class Cost(KVPolicy):
    """Lowest uses x recompute cost / size first, aged by the clock."""

    name: ClassVar[str] = "cost"

    def __init__(self) -> None:
        self._clock = 0.0

    def rank(self, entry: Entry) -> tuple[float, ...]:
        return (self._clock + entry.uses * entry.cost / max(entry.size, 1), entry.used)

    def evicted(self, rank: tuple[float, ...]) -> None:
        self._clock = rank[0]
