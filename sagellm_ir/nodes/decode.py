"""`%d = decode @r[s:e](%prefix) : kv<e>`: generate tokens one by one."""

from typing import ClassVar

from attrs import field, frozen

from sagellm_ir.nodes.base import KVNode

__all__ = ["Decode"]


@frozen
class Decode(KVNode):
    """Generates the request's tokens at positions `[start, stop)`, `start` >= the prompt's length.

    The first token of an answer comes out of the prefill that ends the prompt, so a decode of n
    tokens runs n-1 forwards when it starts at the prompt's end, and n when it continues another.
    """

    kind: ClassVar[str] = "decode"

    until: int | None = field(default=None, kw_only=True)
    """The last step it runs in. Set by `schedule`."""
