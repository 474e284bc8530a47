"""`%a = allreduce(%p, %d) {group = tp, bytes = 4608, calls = 60} : sum<4608>`: a collective."""

from typing import ClassVar

from attrs import field, frozen

from sagellm_ir.nodes.base import IRNode
from sagellm_ir.nodes.prefill import Prefill
from sagellm_ir.target import Target

__all__ = ["AllReduce", "collective", "payload"]


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


def payload(node: IRNode, target: Target) -> int:
    """Bytes of one all-reduce over the rows of one forward of a prefill or decode."""
    rows = node.stop - node.start if isinstance(node, Prefill) else 1
    return rows * target.model.hidden * target.model.dtype_bytes


def collective(node: IRNode, target: Target, name: str) -> AllReduce:
    """The sums of each forward of a prefill or decode: after attention and MLP of every layer."""
    return AllReduce(
        name,
        operands=(node.name,),
        bytes=payload(node, target),
        calls=2 * target.model.layers,
        worker=node.worker,
        loc=node.loc,
        origin=node.origin,
    )
