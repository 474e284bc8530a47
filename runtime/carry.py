"""`Contents`: what blocks hold from epoch to epoch of the online planner."""

from collections.abc import Sequence, Set
from hashlib import blake2b

from attrs import field, frozen

from sagellm_ir.identity import BlockIds, Namespace
from sagellm_ir.lowering.plan import KVFree, LiveBlock, PlanRequest, Resident
from sagellm_ir.lowering.replay import Replay
from sagellm_ir.target import DEVICE, Target

__all__ = ["Carry", "Contents", "Job"]

_FEW = 4096
"""Block ids that are never worth forgetting."""


@frozen
class Job:
    """A submitted request."""

    request: PlanRequest
    blocks: tuple[int, ...]
    """Ids of the full blocks of its prompt."""
    number: int
    """How many were submitted before it."""


@frozen
class Carry:
    """What an epoch leaves to the next one."""

    resident: tuple[Resident, ...] = ()
    live: tuple[LiveBlock, ...] = ()
    frees: tuple[KVFree, ...] = ()
    """Blocks that nobody needs any more, still held."""
    computed: dict[str, int] = field(factory=dict)
    """Tokens of each request whose KV is somewhere."""

    def only(self, requests: Set[str]) -> "Carry":
        """The same for fewer requests: live blocks of the others are freed."""
        live = tuple(block for block in self.live if block.request in requests)
        rest = tuple(sorted({b.block for b in self.live} - {b.block for b in live}))
        frees = (*self.frees, KVFree(DEVICE, rest)) if rest else self.frees
        computed = {name: count for name, count in self.computed.items() if name in requests}
        return Carry(self.resident, live, frees, computed)


class Contents:
    """Unfinished requests, the ids of their blocks, and the cached blocks in order of use."""

    def __init__(self, target: Target) -> None:
        self.jobs: dict[str, Job] = {}
        """Requests that have not finished."""
        self._size, self._model = target.block_size, target.model.name
        self._ids = BlockIds(target.block_size)
        self._tidy_at = _FEW
        self._submitted = 0
        self._private: dict[int, str] = {}
        """Ids of blocks of generated tokens, and whose they are."""
        self._lru: dict[int, None] = {}

    def add(self, request: PlanRequest, tokens: Sequence[int]) -> None:
        """Take up a request with this prompt."""
        space = Namespace(self._model, request.adapter, request.tenant)
        blocks = self._ids.of_tokens(tokens, space)
        self.jobs[request.id] = Job(request, blocks, self._submitted)
        self._submitted += 1

    def blocks(self, job: Job, count: int) -> tuple[int, ...]:
        """Ids of a request's first full blocks, generated ones included."""
        known = len(job.blocks)
        return job.blocks[:count] + tuple(self._own(job, at) for at in range(known, count))

    def _own(self, job: Job, at: int) -> int:
        """The id of a block that ends in generated tokens: nobody else has it."""
        digest = blake2b(f"{job.number}:{at}".encode(), digest_size=16, person=b"generated")
        content = self._ids.of_digest(digest.digest())
        self._private[content] = job.request.id
        return content

    def carry(self, replay: Replay) -> Carry:
        """Sort what the tiers hold after a replay into cache, live blocks and rubbish."""
        size = self._size
        for request in replay.plan.requests:
            for content in reversed(request.blocks):
                self._lru.pop(content, None)
                self._lru[content] = None
        worker = replay.target.workers[0].name
        kept = {tier.name: dict[int, int]() for tier in replay.target.tiers}
        partial: dict[int, tuple[int, int]] = {}
        for (tier, _), held in replay.blocks.items():
            for number, block in held.items():
                wanted = self._content(block.content)
                if wanted is None:
                    continue
                if block.filled == size:
                    kept[tier].setdefault(wanted, number)
                elif tier == DEVICE:
                    partial[wanted] = max(partial.get(wanted, (0, 0)), (block.filled, number))
        live, computed = self._live(replay, kept, partial)
        used = {DEVICE: {block.block for block in live}}
        frees = []
        for (tier, _), held in replay.blocks.items():
            keep = used.get(tier, set()) | set(kept[tier].values())
            if rest := tuple(sorted(held.keys() - keep)):
                frees.append(KVFree(tier, rest))
        order = {content: place for place, content in enumerate(self._lru)}
        resident = []
        for tier, where in kept.items():
            if where:
                ids = tuple(sorted(where, key=lambda content: order.get(content, len(order))))
                resident.append(Resident(tier, ids, tuple(where[c] for c in ids), worker))
        self._lru = {c: None for c in self._lru if any(c in where for where in kept.values())}
        self._private = {c: name for c, name in self._private.items() if name in self.jobs}
        self._tidy(kept)
        return Carry(tuple(resident), live, tuple(frees), computed)

    def _tidy(self, kept: dict[str, dict[int, int]]) -> None:
        """Forget the ids of blocks that no tier and no request has, each time they have doubled."""
        if len(self._ids) < self._tidy_at:
            return
        self._ids.keep(
            {c for where in kept.values() for c in where}
            | {c for job in self.jobs.values() for c in job.blocks}
        )
        self._tidy_at = max(_FEW, 2 * len(self._ids))

    def _content(self, content: object) -> int | None:
        """The id of a block's content in the next epoch; None when nobody can want it."""
        if isinstance(content, int):
            owner = self._private.get(content)
            if owner is None or owner in self.jobs:
                return content
        elif isinstance(content, tuple) and (job := self.jobs.get(content[0])):
            return self._own(job, content[1])
        return None

    def _live(
        self,
        replay: Replay,
        kept: dict[str, dict[int, int]],
        partial: dict[int, tuple[int, int]],
    ) -> tuple[tuple[LiveBlock, ...], dict[str, int]]:
        """The live block of each request under way, and how far its KV reaches."""
        size = self._size
        live: list[LiveBlock] = []
        computed: dict[str, int] = {}
        for name, state in replay.states.items():
            if (job := self.jobs.get(name)) is None or not state.started:
                continue
            at = 0
            length = state.request.prompt_len + state.request.max_new_tokens
            for content in self.blocks(job, length // size + 1):
                if not any(content in where for where in kept.values()):
                    break
                at += 1
            computed[name] = at * size
            content = self.blocks(job, at + 1)[at]
            filled, number = partial.get(content, (0, 0))
            if filled and all(block.block != number for block in live):
                computed[name] += filled
                live.append(LiveBlock(name, number, computed[name]))
        return tuple(live), computed
