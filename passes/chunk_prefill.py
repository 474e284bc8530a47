"""`chunk-prefill`: long prefills become chains of chunks."""

from collections.abc import Sequence
from typing import ClassVar

from attrs import field, frozen, validators

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, IRNode, KVFetch, KVMigrate, KVNode, Prefill
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.rewrite import Names, finish, split
from sagellm_ir.target import DEVICE

__all__ = ["ChunkPrefill"]


@frozen
class ChunkPrefill(Pass):
    """Splits prefills that are longer than a step's token budget.

    A prefill `%x` of more than `tokens` tokens becomes a chain `%x.0`, `%x.1`, ..., `%x`, each of at
    most `tokens`. Chunks end at block boundaries (where a block fits the budget), so no block is
    written by two of them. The last one keeps the name: users of `%x` stay as they are. A prefill
    that exceeds the target's `max_tokens` is split even when no rewrite is left, because it
    could not run at all. Where a move copies the prefill's KV, it becomes a move of each chunk.

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
        c = graph.columns
        if not (c.is_prefill & (c.stop - c.start > limit)).any():
            return graph
        size = graph.target.block_size
        names = Names(graph)
        chunks: dict[str, Sequence[KVNode]] = {}
        nodes: list[IRNode] = []
        for node in graph.nodes:
            if isinstance(node, AllReduce):
                continue
            parts: Sequence[IRNode] = (node,)
            if isinstance(node, Prefill):
                length = node.stop - node.start
                if length > limit and (length > most or ctx.may_rewrite()):
                    cuts = _cuts(node.start, node.stop, limit, size)
                    parts = chunks[node.name] = split(
                        node, cuts, names.numbered(f"{node.name}."), self.name
                    )
                    ctx.count("prefills split")
                    ctx.count("chunks", len(parts))
            elif isinstance(node, (KVFetch, KVMigrate)) and node.source in chunks:
                made = chunks[node.source]
                parts = chunks[node.name] = _copies(node, made, size, names, self.name)
                ctx.count("moves split")
            nodes += parts
        return finish(graph, nodes, ordered=True) if ctx.counts else graph


def _copies(
    node: KVFetch | KVMigrate, chunks: Sequence[KVNode], size: int, names: Names, by: str
) -> Sequence[KVNode]:
    """A move of a value that became chunks, as a chain of moves of single chunks.

    A block belongs to the chunk that begins it. Its move copies it, so it waits until the chunk
    that fills the block has run.
    """
    sources = [chunk for chunk in chunks if chunk.stop > node.start and chunk.start < node.stop]
    cuts = [chunk.stop for chunk in sources[:-1]]
    moves = split(node, cuts, names.numbered(f"{node.name}."), by)
    copies = []
    for move, source in zip(moves, sources, strict=True):
        if move is moves[0]:
            move = move.replace(operands=(source.name, *node.operands[1:]))
        elif node.tier == DEVICE:
            move = move.replace(operands=(source.name, *move.operands))
        else:
            move = move.replace(operands=(source.name,), after=move.operands)
        full = -(-source.stop // size) * size
        filler = next((chunk for chunk in sources if chunk.stop >= full), sources[-1])
        if filler is not source:
            move = move.replace(after=(*move.after, filler.name))
        copies.append(move)
    return copies


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
