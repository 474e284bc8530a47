"""First in, first out."""

from typing import ClassVar

from sagellm_ir.passes.kv_policy.base import Entry, KVPolicy

__all__ = ["FIFO"]


class FIFO(KVPolicy):
    """Longest resident first."""

    name: ClassVar[str] = "fifo"

    def rank(self, entry: Entry) -> tuple[float, ...]:
        return (entry.inserted,)
