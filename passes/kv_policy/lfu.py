"""Least frequently used."""

from typing import ClassVar

from sagellm_ir.passes.kv_policy.base import Entry, KVPolicy

__all__ = ["LFU"]


class LFU(KVPolicy):
    """Fewest uses since it became resident first; of those, the least recently used."""

    name: ClassVar[str] = "lfu"

    def rank(self, entry: Entry) -> tuple[float, ...]:
        return (entry.uses, entry.used)
