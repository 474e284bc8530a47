"""Passes that do wrong, each in its own way, to see what the manager makes of it."""

from typing import ClassVar

from attrs import frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import Decode
from sagellm_ir.passes.base import Pass, PassContext

__all__ = ["Crash", "DropDecodes", "LieAboutStage", "Nothing", "Refuse", "Rename"]


@frozen
class Nothing(Pass):
    """Does nothing."""

    name: ClassVar[str] = "nothing"
    times: int = 1

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        ctx.count("times", self.times)
        return graph


@frozen
class Crash(Pass):
    """Raises."""

    name: ClassVar[str] = "crash"

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        raise IndexError("out of luck")


@frozen
class Refuse(Pass):
    """Says that the target cannot do it."""

    name: ClassVar[str] = "refuse"

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        raise SageIRError(Diagnostic("the target is too small"))


@frozen
class DropDecodes(Pass):
    """Breaks the law that every request is answered."""

    name: ClassVar[str] = "drop-decodes"

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        kept = tuple(node for node in graph.nodes if not isinstance(node, Decode))
        return graph.replace(nodes=kept)


@frozen
class LieAboutStage(Pass):
    """Says it gives a placed graph."""

    name: ClassVar[str] = "lie"
    gives: ClassVar[str | None] = "placed"

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        return graph


@frozen
class Rename(Pass):
    """Renames decodes, one rewrite each."""

    name: ClassVar[str] = "rename"

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        nodes = [
            node.replace(name=f"x{i}") if isinstance(node, Decode) and ctx.may_rewrite() else node
            for i, node in enumerate(graph.nodes)
        ]
        return graph.replace(nodes=tuple(nodes))
