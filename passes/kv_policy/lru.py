"""Least recently used."""

from typing import ClassVar

from sagellm_ir.passes.kv_policy.base import Entry, KVPolicy

__all__ = ["LRU"]


class LRU(KVPolicy):
    """Least recently used first."""

    name: ClassVar[str] = "lru"

    def rank(self, entry: Entry) -> tuple[float, ...]:
        return (entry.used,)
