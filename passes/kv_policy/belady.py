"""Belady's MIN: evict what is used farthest in the future.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
Journal 5(2), 1966. A prefix is never used later than what builds on it, so evicting leaves first
costs MIN nothing: on equal blocks it is optimal.
"""

from typing import ClassVar

from sagellm_ir.passes.kv_policy.base import Entry, KVPolicy

__all__ = ["Belady"]


class Belady(KVPolicy):
    """Farthest next use first; of those, the one that frees most."""

    name: ClassVar[str] = "belady"
    bypass: ClassVar[bool] = True

    def rank(self, entry: Entry) -> tuple[float, ...]:
        return (-entry.next_use, -entry.size)
