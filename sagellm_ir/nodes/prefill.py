"""`%p = prefill @r[s:e](%prefix) : kv<e>`: run prompt tokens through the model."""

from typing import ClassVar

from attrs import frozen

from sagellm_ir.nodes.base import KVNode

__all__ = ["Prefill"]


@frozen
class Prefill(KVNode):
    """Computes the KV of prompt tokens `[start, stop)` on top of the prefix operand.

    The prefill that reaches the end of the prompt also yields the first new token.
    """

    kind: ClassVar[str] = "prefill"
