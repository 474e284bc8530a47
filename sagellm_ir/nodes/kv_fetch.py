"""`%f = kv_fetch @r[s:e](%source, %prefix) {from = host} : kv<e>`: bring KV to the device."""

from typing import ClassVar

from attrs import field, frozen

from sagellm_ir.nodes.base import KVNode

__all__ = ["KVFetch"]


@frozen
class KVFetch(KVNode):
    """Brings the KV of `[start, stop)` from a tier to the device.

    Operands: the source value, left out when the engine's cache holds it already (the graph's
    `cache` lines), then the prefix value when `start` > 0. Fetching from `device` is the hit
    itself: it pins resident blocks and copies nothing.
    """

    kind: ClassVar[str] = "kv_fetch"

    src: str = field(default="host", kw_only=True, metadata={"text": "from"})
    """The tier it reads."""

    @property
    def source(self) -> str | None:
        """The value it copies, or None when it reads the engine's cache."""
        return self.operands[0] if len(self.operands) > (self.start > 0) else None
