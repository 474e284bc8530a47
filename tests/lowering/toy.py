"""A toy front end for the lowering's tests: requests -> a scheduled graph, by simple means.

Prompts are split where sharing begins or ends and at the chunk size; steps fill first come, first
served. It knows nothing of the passes, so lowering is tested on its own.
"""

from collections import Counter, deque
from collections.abc import Sequence

from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.nodes import Decode, IRNode, Prefill
from sagellm_ir.target import Target

__all__ = ["scheduled"]


def _prefills(decls: Sequence[RequestDecl], block: int, chunk: int) -> dict[str, list[Prefill]]:
    """Per request, the prefills it is the first to need."""
    count = Counter(content for decl in decls for content in decl.blocks)
    made: dict[tuple[int, int], str] = {}
    nodes: dict[str, list[Prefill]] = {}
    for decl in decls:
        shareable = (decl.prompt_len - 1) // block
        cuts = {decl.prompt_len, *range(chunk, decl.prompt_len, chunk)}
        for at in range(1, shareable + 1):
            if at == shareable or count[decl.blocks[at]] != count[decl.blocks[at - 1]]:
                cuts.add(at * block)
        start, prefix = 0, ""
        own: list[Prefill] = []
        for stop in sorted(cuts):
            whole = stop % block == 0 and stop <= shareable * block
            key = (decl.blocks[stop // block - 1], stop) if whole else (-1, -1)
            if key in made:
                prefix = made[key]
            else:
                operands = (prefix,) if prefix else ()
                name = f"{decl.id}p{stop}"
                own.append(Prefill(name, decl.id, start, stop, operands=operands))
                prefix = name
                if whole:
                    made[key] = name
            start = stop
        nodes[decl.id] = own
    return nodes


def scheduled(target: Target, decls: Sequence[RequestDecl], name: str = "toy") -> IRGraph:
    """A legal scheduled graph that serves `decls` in order; capacity is not looked at."""
    prefills = _prefills(decls, target.block_size, target.max_tokens)
    queue = deque(node for decl in decls for node in prefills[decl.id])
    by_id = {decl.id: decl for decl in decls}
    placed: list[IRNode] = []
    loops: list[int] = []
    left: dict[str, int] = {}
    decode: dict[str, Decode] = {}
    while queue or left:
        step, budget, room = len(loops), target.max_tokens - len(left), target.max_batch - len(left)
        chunks: list[Prefill] = []
        while queue and (target.mixed or not left or chunks):
            node = queue[0]
            if node.stop - node.start > budget or room < 1:
                break
            if any(
                other.request == node.request or other.name in node.operands for other in chunks
            ):
                break
            queue.popleft()
            budget -= node.stop - node.start
            room -= 1
            chunks.append(node)
        run = 1 if chunks else min(target.max_loops, *left.values(), target.max_loops)
        if not chunks and queue and not target.mixed:
            run = min(left.values())
        loops.append(min(run, target.max_loops))
        for name_ in sorted(left) if target.mixed or not chunks else ():
            left[name_] -= loops[-1]
            if not left[name_]:
                del left[name_]
                placed.append(decode.pop(name_).replace(until=step))
        for chunk in chunks:
            placed.append(chunk.replace(step=step))
            decl = by_id[chunk.request]
            if chunk.stop == decl.prompt_len:
                made = Decode(
                    f"{decl.id}d", decl.id, chunk.stop, decl.stop, operands=(chunk.name,), step=step
                )
                if decl.max_new_tokens == 1:
                    placed.append(made.replace(until=step))
                else:
                    decode[decl.id] = made.replace(step=step + 1)
                    left[decl.id] = decl.max_new_tokens - 1
    placed.sort(key=lambda node: node.step or 0)
    return IRGraph(name, target, tuple(decls), tuple(placed), (), "scheduled", tuple(loops))
