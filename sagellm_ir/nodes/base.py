"""What all nodes have in common."""

from typing import Any, ClassVar, TypeVar

from attrs import evolve, field, frozen

__all__ = ["IRNode", "KVNode", "Location", "Origin"]

Node = TypeVar("Node", bound="IRNode")


@frozen
class Location:
    """Where something was written."""

    file: str
    line: int
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@frozen
class Origin:
    """Which pass made a node, and from which nodes."""

    by: str
    sources: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.by}({', '.join(self.sources)})"


@frozen
class IRNode:
    """One operation. Its name is its result, unique in its graph; operands are names.

    Subclass fields are the attributes that the text shows between braces, so their order and
    defaults are part of the format.
    """

    kind: ClassVar[str]

    name: str
    operands: tuple[str, ...] = field(default=(), kw_only=True)
    """Data edges: values this node reads."""
    after: tuple[str, ...] = field(default=(), kw_only=True)
    """Order edges: nodes that must have finished before this one starts."""
    step: int | None = field(default=None, kw_only=True)
    """The step this node runs in; a decode starts in it. Set by `schedule`."""
    worker: str | None = field(default=None, kw_only=True)
    """The worker this node runs on, and its result lives on. Set by `disaggregate`."""
    loc: Location | None = field(default=None, kw_only=True, eq=False)
    origin: Origin | None = field(default=None, kw_only=True, eq=False)

    @property
    def type(self) -> str:
        """The type of the result, as the text shows it; by default one of the kind's own."""
        return self.kind

    def replace(self: Node, **changes: Any) -> Node:
        """A copy of this node with some fields changed."""
        return evolve(self, **changes)


@frozen
class KVNode(IRNode):
    """A node whose result is the KV of a request's tokens `[0, stop)`.

    It makes (or moves) the part `[start, stop)`; the part before it belongs to its prefix operand.
    """

    request: str
    start: int
    stop: int

    @property
    def type(self) -> str:
        return f"kv<{self.stop}>"

    @property
    def prefix(self) -> str | None:
        """The operand that holds `[0, start)` on the device, or None when `start` is 0."""
        return self.operands[-1] if self.start and self.operands else None

    @property
    def tier(self) -> str:
        """The tier the result lives in."""
        return "device"
