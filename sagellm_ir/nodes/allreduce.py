"""`%a = allreduce(%p, %d) {group = tp, bytes = 4608, calls = 60} : sum<4608>`: a collective."""

from typing import ClassVar

from attrs import field, frozen

from sagellm_ir.nodes.base import IRNode

__all__ = ["AllReduce"]


@frozen
class AllReduce(IRNode):
    """Sums the partial results of the tensor-parallel ranks for the rows of its operands.

    It runs inside every forward of its operands, `calls` times.
    """

    kind: ClassVar[str] = "allreduce"

    group: str = field(default="tp", kw_only=True)
    bytes: int = field(default=0, kw_only=True)
    """Payload of one call, in bytes."""
    calls: int = field(default=1, kw_only=True)
    """Calls of one forward (two a layer: after attention, after the MLP)."""
    fused: str | None = field(default=None, kw_only=True)
    """What is fused into the call: `residual-norm`, or nothing."""

    @property
    def type(self) -> str:
        return f"sum<{self.bytes}>"
