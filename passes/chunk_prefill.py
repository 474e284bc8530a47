"""`chunk-prefill`: long prefills become chains of chunks."""

from typing import ClassVar

from attrs import field, frozen, validators

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, IRNode, Prefill
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.rewrite import Names, finish, split

__all__ = ["ChunkPrefill"]


@frozen
class ChunkPrefill(Pass):
    """Splits prefills that are longer than a step's token budget.

    A prefill `%x` of more than `tokens` tokens becomes a chain `%x.0`, `%x.1`, ..., `%x`, each of at
    most `tokens`. Chunks end at block boundaries (where a block fits the budget), so no block is
    written by two of them. The last one keeps the name: users of `%x` stay as they are. A prefill
    that exceeds the target's `max_tokens` is split even when no rewrite is left, because it
    could not run at all.

    This bounds how long one prompt holds up the decodes beside it (A. Agrawal et al.,
    "Sarathi-Serve", OSDI 2024).
    """

    name: ClassVar[str] = "chunk-prefill"
    needs: ClassVar[tuple[str, ...]] = ("built",)

    tokens: int | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Most tokens of a chunk; none, or more than the target's `max_tokens`, means `max_tokens`."""

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        most = graph.target.max_tokens
        limit = min(self.tokens or most, most)
        size = graph.target.block_size
        names = Names(graph)
        nodes: list[IRNode] = []
        for node in graph.nodes:
            if isinstance(node, AllReduce):
                continue
            length = node.stop - node.start if isinstance(node, Prefill) else 0
            if (
                isinstance(node, Prefill)
                and length > limit
                and (length > most or ctx.may_rewrite())
            ):
                cuts = _cuts(node.start, node.stop, limit, size)
                fresh = [names.fresh(f"{node.name}.{i}") for i in range(len(cuts))]
                nodes += split(node, cuts, fresh, self.name)
                ctx.count("prefills split")
                ctx.count("chunks", len(cuts) + 1)
            else:
                nodes.append(node)
        return finish(graph, nodes) if ctx.counts else graph


def _cuts(start: int, stop: int, limit: int, block: int) -> list[int]:
    """Where to cut `[start, stop)` into parts of at most `limit`: as few cuts at block ends as
    there can be, and inside blocks only if a block does not fit."""
    cuts = []
    while stop - start > limit:
        end = start + limit
        aligned = end - end % block
        start = aligned if aligned > start else end
        cuts.append(start)
    return cuts
