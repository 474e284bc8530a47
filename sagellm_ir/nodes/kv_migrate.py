"""`%m = kv_migrate @r[s:e](%source) {to = host} : kv<e>`: copy KV to a lower tier or a worker."""

from typing import ClassVar

from attrs import field, frozen

from sagellm_ir.nodes.base import KVNode

__all__ = ["KVMigrate"]


@frozen
class KVMigrate(KVNode):
    """Copies the KV of `[start, stop)` of its source to a tier, or to another worker's device.

    Operands: the source value, then, when it lands on a device and `start` > 0, the prefix value
    there. The source stays alive while it has uses: a spill is a migrate that is its last one.
    """

    kind: ClassVar[str] = "kv_migrate"

    to: str = field(default="host", kw_only=True)
    """The tier it writes."""

    @property
    def source(self) -> str:
        """The value it copies."""
        return self.operands[0]

    @property
    def prefix(self) -> str | None:
        """The operand that holds `[0, start)` where it lands; None off the device."""
        return self.operands[1] if len(self.operands) > 1 else None

    @property
    def tier(self) -> str:
        return self.to
