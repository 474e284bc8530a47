"""`Fragment`: the plan of what has arrived, in block numbers of its own, and its relocation.

The passes see a small target: the cached blocks that the new requests hit, the space that is left,
the seats that are left. What runs already is not in it. Like a linker, `relocate` replaces the
fragment's block numbers by the engine's, step by step, as the steps are given out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import takewhile
from typing import Any

from attrs import define, evolve, field, frozen

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.lowering.lower import lower, lower_steps
from sagellm_ir.lowering.plan import (
    Bind,
    ExecutionPlan,
    KVFree,
    KVMove,
    LiveBlock,
    PlanStep,
    Resident,
)
from sagellm_ir.nodes import Decode, IRNode, Prefill
from sagellm_ir.nodes.allreduce import collective
from sagellm_ir.runtime.ledger import Ledger
from sagellm_ir.target import DEVICE, Target

__all__ = ["Fragment", "Held", "assemble", "warm_up"]


@frozen
class Held:
    """The unfinished last block of a request that goes on."""

    request: str
    block: int
    tokens: int
    """Tokens of the request whose KV is there; with the full blocks before it."""


@define(eq=False)
class Fragment:
    """A compiled plan whose first prefills are being given out.

    Its blocks stand for those of `ledger`; each that is known is held until `close`.
    """

    plan: Callable[[], ExecutionPlan]
    """Makes the whole plan, for who wants to see it."""
    steps: Sequence[PlanStep]
    """Its steps up to the end of its first prefills, in the plan's numbers. What it would do from
    there on is decided anew, when decodes have ended."""
    ledger: Ledger
    decls: dict[str, RequestDecl]
    _blocks: dict[str, dict[int, int]]
    """By tier and the plan's number: the engine's block."""
    position: int = 0
    """Steps given out."""
    begun: set[str] = field(factory=set)
    """Requests whose prompts have ended."""

    def __attrs_post_init__(self) -> None:
        for tier, known in self._blocks.items():
            self.ledger[tier].hold(known.values())

    def next(self) -> PlanStep | None:
        """The next step; None after the last one."""
        return self.steps[self.position] if self.position < len(self.steps) else None

    def close(self) -> None:
        """Hold nothing any more."""
        for tier, known in self._blocks.items():
            self.ledger[tier].drop([*known.values()][::-1])
            known.clear()

    def fits(self, kv: Sequence[KVFree | KVMove], binds: Sequence[Bind]) -> bool:
        """Whether there is room for a step's new blocks, once its frees are `forget`ed."""
        if not kv and sum([len(bind.blocks) for bind in binds]) <= self.ledger[DEVICE].room:
            return True
        fresh: dict[str, set[int]] = {}
        for item in kv:
            if isinstance(item, KVMove):
                fresh.setdefault(item.to_tier, set()).update(item.dst)
        for bind in binds:
            fresh.setdefault(DEVICE, set()).update(bind.blocks)
        return all(
            len(numbers.difference(self._blocks[tier])) <= self.ledger[tier].room
            for tier, numbers in fresh.items()
        )

    def forget(self, kv: Iterable[KVFree | KVMove]) -> None:
        """Let go of what a step frees; whether the engine frees it is for the ledger to say."""
        for item in kv:
            if isinstance(item, KVFree):
                known, shelf = self._blocks[item.tier], self.ledger[item.tier]
                for number in item.blocks:
                    if number in known:
                        shelf.drop((known.pop(number),))

    def moves(self, kv: Iterable[KVFree | KVMove]) -> list[KVMove]:
        """A step's moves, between the engine's blocks."""
        moved = []
        for item in kv:
            if isinstance(item, KVMove):
                src = tuple(map(self._blocks[item.from_tier].__getitem__, item.src))
                dst = self.blocks(item.to_tier, item.dst)
                moved.append(evolve(item, src=src, dst=dst))
                self._copy(item, src, dst)
        return moved

    def _copy(self, move: KVMove, src: Sequence[int], dst: Sequence[int]) -> None:
        origin, target = self.ledger[move.from_tier], self.ledger[move.to_tier]
        for old, new in zip(src, dst, strict=True):
            content = origin.content_of[old]
            if content is not None:
                target.write((new,), (content,))

    def blocks(self, tier: str, numbers: Sequence[int]) -> tuple[int, ...]:
        """The engine's blocks of some of the plan's; new ones for those that have none yet."""
        known = self._blocks[tier]
        if unknown := [number for number in numbers if number not in known]:
            fresh = dict.fromkeys(unknown)
            known.update(zip(fresh, self.ledger[tier].take(len(fresh)), strict=True))
        return tuple(map(known.__getitem__, numbers))


def assemble(
    name: str,
    target: Target,
    decls: Sequence[RequestDecl],
    held: Sequence[Held],
    ledger: Ledger,
    compiler: Callable[[IRGraph], IRGraph],
) -> Fragment:
    """Compile requests for the space that a ledger has left.

    Args:
        name: of the graph.
        target: with the seats and tokens that are left; the capacities of its tiers do not count.
        decls: the requests.
        held: unfinished blocks of those that go on.
        ledger: what the tiers hold; the fragment holds what it uses of it, until it is closed.
        compiler: the passes.

    Raises:
        SageIRError: the requests do not fit together.
    """
    hits = _hits(decls, ledger, target.block_size)
    resident, tiers = [], []
    blocks: dict[str, dict[int, int]] = {tier.name: {} for tier in target.tiers}
    live = tuple(
        LiveBlock(item.request, len(hits[DEVICE]) + at, item.tokens) for at, item in enumerate(held)
    )
    for tier in target.tiers:
        shelf, found = ledger[tier.name], hits[tier.name]
        if found:
            ids = tuple(found)
            resident.append(Resident(tier.name, ids, tuple(range(len(ids)))))
            blocks[tier.name].update(enumerate(map(shelf.block_of.__getitem__, ids)))
        held_too = len(found) - sum(map(shelf.idle, found))
        lives = len(live) if tier.name == DEVICE else 0
        tiers.append(evolve(tier, blocks=shelf.room + held_too + lives))
    blocks[DEVICE].update({it.block: own.block for it, own in zip(live, held, strict=True)})
    small = evolve(target, tiers=tuple(tiers))
    cache = tuple(CachedBlocks(item.tier, blocks=item.ids) for item in resident)
    graph = compiler(IRGraph(name, small, tuple(decls), _nodes(decls, small), cache))
    made: dict[str, Any] = {"resident": resident, "live": live, "retain": True}
    steps = takewhile(_is_first, lower_steps(graph, **made))
    known = {decl.id: decl for decl in decls}
    return Fragment(partial(lower, graph, **made), tuple(steps), ledger, known, blocks)


def warm_up(target: Target, compiler: Callable[[IRGraph], IRGraph]) -> None:
    """Compile two small requests that share a prefix, for nothing: the first compilation of a process
    takes eight times as long as the next, for modules that it loads and what Python learns.

    What is wrong with passes or target is left for the compilation of real requests to say.
    """
    size = target.block_size
    decls = [
        RequestDecl(
            f"warm-up{number}", max_new_tokens=2, prompt_len=2 * size + 1, blocks=(0, number)
        )
        for number in (1, 2)
    ]
    ledger = Ledger(target)
    with suppress(SageIRError):
        device = ledger[DEVICE]
        if device.room >= 8:
            taken = device.take(1)
            device.write(taken, (0,))
            device.drop(taken)
        assemble("warm-up", target, decls, (), ledger, compiler)


def _is_first(step: PlanStep) -> bool:
    """Whether a step still belongs to the first prefills: none that decodes alone came before."""
    return bool(step.prefill) or not step.loops


def _hits(
    decls: Iterable[RequestDecl], ledger: Ledger, block_size: int
) -> Mapping[str, dict[int, None]]:
    """By tier: content that the requests' prompts start with; not what holds a last token."""
    hits: dict[str, dict[int, None]] = {tier: {} for tier in ledger}
    shelves = [(shelf.block_of, hits[tier]) for tier, shelf in ledger.items()]
    before: tuple[int, ...] = ()
    for decl in decls:
        blocks = decl.blocks[: (decl.prompt_len - 1) // block_size]
        # Nearly always what the request before hit, and as far.
        known = len(before) if blocks[: len(before)] == before else 0
        reached = known
        for content in blocks[known:]:
            here = [found for block_of, found in shelves if content in block_of]
            if not here:
                break
            for found in here:
                found[content] = None
            reached += 1
        before = blocks[:reached]
    return hits


def _nodes(decls: Iterable[RequestDecl], target: Target) -> tuple[IRNode, ...]:
    """A prefill and a decode for each request."""
    nodes: list[IRNode] = []
    for number, decl in enumerate(decls):
        prefill, decode = f"q{number}.p", f"q{number}.d"
        made = (
            Prefill(prefill, decl.id, 0, decl.prompt_len),
            Decode(decode, decl.id, decl.prompt_len, decl.stop, operands=(prefill,)),
        )
        nodes += made
        if target.tp > 1:
            nodes += [collective(node, target, f"{node.name}.sum") for node in made]
    return tuple(nodes)
