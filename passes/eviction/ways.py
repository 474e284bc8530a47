"""How a value leaves the device: copied to a lower tier, left to a cache, or dropped."""

from attrs import define, field, frozen

from sagellm_ir.cost import CostModel
from sagellm_ir.nodes import Decode, KVFetch, KVNode, Prefill
from sagellm_ir.passes.eviction.live import Live
from sagellm_ir.passes.eviction.steps import StepFacts
from sagellm_ir.passes.kv_policy import KVPolicy, Victims

__all__ = ["Away", "Pool", "Ways"]


@frozen
class Away:
    """Where a value is that left the device: in a store, in a cache, or nowhere."""

    since: int
    """The step of the copy, or -1 when there is none to make."""
    store: int
    """The tier that has it; -1: none, it will be computed again."""
    next_use: int


@define
class Pool:
    """The device tier of one worker, and the stores below it."""

    capacity: int
    policy: KVPolicy
    used: int = 0
    victims: Victims[int] = field(factory=Victims)
    room: dict[int, int] = field(factory=dict)
    """By store: free blocks."""
    least: dict[int, int] = field(factory=dict)
    """By store: the fewest free blocks there have ever been."""
    leaving: list[tuple[int, int, int]] = field(factory=list)
    """Heap of copies that are read for the last time: step, store, blocks."""


class Ways:
    """Chooses between the ways. Values are node indexes.

    Args:
        live: the graph.
        steps: its steps.
        spill: `auto`, `always` or `never`: when to copy what could be computed again.
    """

    def __init__(self, live: Live, steps: StepFacts, spill: str) -> None:
        self.live = live
        self.steps = steps
        self.spill = spill
        self.target = live.graph.target
        self.cost = CostModel(self.target)
        self.away: dict[int, Away] = {}
        """Values that have left and are needed again."""
        forward = [isinstance(node, Prefill | Decode) for node in live.graph.nodes]
        self.copyable = [end + made for end, made in zip(live.end, forward, strict=True)]
        """The first step in which each can be copied: moves run before the forward."""
        self.copied = {source for source in live.source if source >= 0}
        self.copied_decodes = [
            (live.step[i], live.end[i])
            for i in sorted(self.copied)
            if isinstance(live.graph.nodes[i], Decode)
        ]

    def send_away(self, pool: Pool, value: int, step: int, next_use: int) -> Away | None:
        """How the value leaves, by the cheapest way there is; None when there is none."""
        blocks, worker = self.live.blocks[value], self.live.worker[value]
        node = self.live.graph.nodes[value]
        assert isinstance(node, KVNode)
        if (store := self._cached(pool, value)) >= 0:
            pool.room[store] -= blocks
            pool.least[store] -= blocks
            return Away(-1, store, next_use)
        drop, since = self._droppable(value, next_use), self.steps.before(step, worker)
        store = -1
        if since >= max(self.copyable[value], 0) and self.live.step[value] < step:
            store = self._store(pool, blocks)
            if store < 0 and not drop:
                store = self._reclaim(pool, worker, blocks)
        if store < 0 or (drop and not self._worth_copying(node, store, blocks, next_use)):
            return Away(-1, -1, next_use) if drop else None
        pool.room[store] -= blocks
        pool.least[store] = min(pool.least[store], pool.room[store])
        return Away(since, store, next_use)

    def _worth_copying(self, node: KVNode, store: int, blocks: int, next_use: int) -> bool:
        """Whether a copy down and up costs less than computing the value again."""
        if self.spill != "auto":
            return self.spill == "always"
        again = self.cost.prefill(node.start, node.stop)
        if node.stop - node.start > self.steps.spare[next_use]:
            again += self.cost.forward(0, 0, 0, 0)  # takes a step of its own
        return 2 * self.cost.transfer(blocks, self.target.tiers[store].name) < again

    def _droppable(self, value: int, next_use: int) -> bool:
        """Whether the value can be computed again: whole blocks of a prompt, not its end.

        The end of a prompt yields a token, which must not be drawn twice; what an answer says is
        not known yet; and a block that two values share is made by both in turn.
        """
        node = self.live.graph.nodes[value]
        assert isinstance(node, KVNode)
        size = self.target.block_size
        inside = node.stop < self.live.graph.request[node.request].prompt_len
        whole = not node.start % size and not node.stop % size
        # if it takes several prefills, no single node has all of what a move copies
        single = node.stop - node.start <= self.target.max_tokens
        return (
            inside and whole and (single or value not in self.copied) and not self._fixed(next_use)
        )

    def _fixed(self, next_use: int) -> bool:
        """Whether a decode that a move copies later runs in the step that needs the value next:
        it must stay whole, so no step that cuts it can be put in there."""
        return self.target.mixed and any(
            first < next_use <= end for first, end in self.copied_decodes
        )

    def _store(self, pool: Pool, blocks: int) -> int:
        """The fastest lower tier with room, or -1."""
        fits = [tier for tier, room in pool.room.items() if room >= blocks]
        return min(fits, key=lambda tier: self.cost.transfer(blocks, self._name(tier)), default=-1)

    def _name(self, tier: int) -> str:
        return self.target.tiers[tier].name

    def _reclaim(self, pool: Pool, worker: int, blocks: int) -> int:
        """Gives up copies that can be computed again, latest next use first, until one store has
        room for a value that cannot; -1 if that is not to be had."""
        copies = [
            (-away.next_use, value)
            for value, away in self.away.items()
            if away.since >= 0
            and self.live.worker[value] == worker
            and self._droppable(value, away.next_use)
        ]
        for _, value in sorted(copies):
            away = self.away[value]
            pool.room[away.store] += self.live.blocks[value]
            self.away[value] = Away(-1, -1, away.next_use)
            if (store := self._store(pool, blocks)) >= 0:
                return store
        return -1

    def _cached(self, pool: Pool, value: int) -> int:
        """A lower tier whose cache has the value, with room to keep it there; or -1.

        The room must have been there all the time: nothing may have overwritten the blocks.
        """
        live = self.live
        node = live.graph.nodes[value]
        if not isinstance(node, KVFetch) or node.source is not None or self.spill == "never":
            return -1
        size = self.target.block_size
        wanted = live.graph.request[node.request].blocks[node.start // size : node.stop // size]
        for line in live.graph.cache:
            tier = next(i for i, spec in enumerate(self.target.tiers) if spec.name == line.tier)
            there = line.worker in (None, self.target.workers[live.worker[value]].name)
            if (
                tier != live.device
                and there
                and pool.least[tier] >= live.blocks[value]
                and set(wanted) <= set(line.blocks)
            ):
                return tier
        return -1

    def span(self, value: int) -> int:
        """Tokens of the value."""
        node = self.live.graph.nodes[value]
        assert isinstance(node, KVNode)
        return node.stop - node.start
