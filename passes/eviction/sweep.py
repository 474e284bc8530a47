"""The sweep: which values leave the device, when, how, and when they come back.

KV memory over a schedule is a register file over a program: values are live in ranges, a value
that finds no room splits the range of another one, and the split costs a store and a load, or
computing the value again (P. Briggs, K. Cooper, L. Torczon, "Rematerialization", PLDI 1992). Two
things differ: a use needs the whole prefix chain at once, so what leaves are leaves of the
resident forest and what returns comes from the root on; and a policy may be blind to the future.
"""

from collections import defaultdict
from heapq import heappop, heappush

from attrs import define, field, frozen

from sagellm_ir.cost import CostModel
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.nodes import Decode, KVFetch, KVNode, Prefill
from sagellm_ir.passes.eviction.live import Live
from sagellm_ir.passes.eviction.steps import Steps
from sagellm_ir.passes.kv_policy import Entry, KVPolicy, Victims, make_policy

__all__ = ["Away", "Batch", "Sweep"]


@frozen
class Away:
    """Where a value is that left the device: in a store, in a cache, or nowhere."""

    since: int
    """The step of the copy, or -1 when there is none to make."""
    store: int
    """The tier that has it; -1: none, it will be computed again."""
    next_use: int


@frozen
class Batch:
    """What comes back in one step, roots first, each with how it had left."""

    step: int
    values: tuple[tuple[int, Away], ...]


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


class Sweep:
    """One run over the steps of a graph. Values are node indexes."""

    def __init__(self, live: Live, steps: Steps, policy: str, spill: str) -> None:
        self.live = live
        self.steps = steps
        self.spill = spill
        self.target = live.graph.target
        self.cost = CostModel(self.target)
        count = len(live.step)
        self.resident = bytearray(count)
        self.children = [0] * count
        """Resident values that build on each."""
        self.active = [0] * count
        """Running nodes, and active values that build on each."""
        self.inserted = [0] * count
        """The step in which each took its place, last."""
        self.used = [0] * count
        """The last step in which each was active."""
        self.count = [0] * count
        """How often each became active since it took its place."""
        self.away: dict[int, Away] = {}
        forward = [isinstance(node, Prefill | Decode) for node in live.graph.nodes]
        self.copyable = [end + made for end, made in zip(live.end, forward, strict=True)]
        """The first step in which each can be copied: moves run before the forward."""
        self.batches: list[Batch] = []
        self.copied = {source for source in live.source if source >= 0}
        self.copied_decodes = [
            (live.step[i], live.end[i])
            for i in sorted(self.copied)
            if isinstance(live.graph.nodes[i], Decode)
        ]
        self.request = [getattr(node, "request", "") for node in live.graph.nodes]
        self.pools = [self._pool(worker, policy) for worker in range(len(self.target.workers))]
        self.uses = self._uses()
        """By value: heap of what will start, or come back, on top of it: step, node."""
        self.protected = self._protected()
        """By value: the last step in which another worker copies it."""

    def _pool(self, worker: int, policy: str) -> Pool:
        live = self.live
        pool = Pool(self.target.tiers[live.device].blocks, make_policy(policy))
        held = live.held()
        for tier, spec in enumerate(self.target.tiers):
            if tier != live.device:
                own = max(held.get((tier, worker), ()), default=0)
                pool.room[tier] = pool.least[tier] = spec.blocks - own
                if own > spec.blocks:
                    raise SageIRError(
                        Diagnostic(
                            f"tier {spec.name!r} has {spec.blocks} blocks, but the graph's own "
                            f"copies need {own} at once",
                            help="raise the tier's blocks, or copy less to it",
                        )
                    )
        return pool

    def _uses(self) -> list[list[tuple[int, int]]]:
        live = self.live
        uses: list[list[tuple[int, int]]] = [[] for _ in live.step]
        for i in sorted(range(len(live.step)), key=live.step.__getitem__):
            if (at := live.prefix[i]) >= 0:
                uses[at].append((live.step[i], i))
            if (at := live.source[i]) >= 0:
                uses[at].append((live.step[i], i))
        for value in live.pins:  # what the cache holds waits for its own fetch first
            heappush(uses[value], (live.step[value], value))
        return uses

    def _protected(self) -> dict[int, int]:
        live = self.live
        protected: dict[int, int] = {}
        for i, source in enumerate(live.source):
            while source >= 0 and live.worker[source] != live.worker[i]:
                protected[source] = max(protected.get(source, -1), live.step[i])
                source = live.prefix[source]
        return protected

    # --- the sweep ---

    def run(self) -> None:
        """Fills `batches`."""
        live = self.live
        starts: dict[int, list[int]] = defaultdict(list)
        ends: dict[int, list[int]] = defaultdict(list)
        deaths: dict[int, list[int]] = defaultdict(list)
        for i, tier in enumerate(live.tier):
            if tier >= 0:
                starts[live.step[i]].append(i)
                ends[live.end[i]].append(i)
                deaths[live.last[i]].append(i)
        released: dict[int, list[int]] = defaultdict(list)
        for value, step in self.protected.items():
            released[step].append(value)
        for value in live.pins:
            self._settle(value, -1)
        for value in live.pins:
            self._offer(value, 0)
        for step in range(len(live.graph.loops)):
            if step in starts:
                self._start(step, starts[step])
            for node in ends.get(step, ()):
                held = self._held(node)
                if held >= 0:
                    self._deactivate(held, step + 1)
            for value in deaths.get(step, ()):
                if self.resident[value]:
                    self._leave(value, step + 1)
            for value in released.get(step, ()):
                self._offer(value, step + 1)

    def _held(self, node: int) -> int:
        """The device value that keeps its chain in place while the node runs, or -1."""
        live = self.live
        if live.tier[node] == live.device:
            return node
        source = live.source[node]
        return source if source >= 0 and live.tier[source] == live.device else -1

    def _start(self, step: int, nodes: list[int]) -> None:
        """What starts in a step takes its place, and so does what it builds on."""
        live, back = self.live, set[int]()
        for node in nodes:
            at = self._held(node)
            while at >= 0 and not self.resident[at]:
                self._settle(at, step)
                if at in self.away:
                    back.add(at)
                at = live.prefix[at]
        for node in nodes:
            if (at := self._held(node)) >= 0:
                self._activate(at)
        worker = live.worker[nodes[0]]
        pool = self.pools[worker]
        while pool.leaving and pool.leaving[0][0] < self.steps.before(step, worker):
            _, store, blocks = heappop(pool.leaving)
            pool.room[store] += blocks
        if pool.used > pool.capacity:
            self._make_room(pool, worker, step)
        if back:
            values = tuple((value, self.away.pop(value)) for value in sorted(back))
            self.batches.append(Batch(step, values))
            for value, away in values:
                if away.store >= 0:
                    heappush(pool.leaving, (step, away.store, live.blocks[value]))

    def _settle(self, value: int, step: int) -> None:
        """The value takes its place on the device."""
        live = self.live
        self.resident[value] = 1
        self.pools[live.worker[value]].used += live.blocks[value]
        if value in self.away:
            computed = self.away[value].store < 0
            self.copyable[value] = step + computed
            if computed and self._span(value) > self.target.max_tokens:
                self.copyable[value] = len(live.graph.loops)  # several nodes: never copied whole
        self.inserted[value] = self.used[value] = step
        self.count[value] = 0
        if live.prefix[value] >= 0:
            self.children[live.prefix[value]] += 1

    def _seconds(self, value: int) -> float:
        """What it takes to compute the value again."""
        node = self.live.graph.nodes[value]
        assert isinstance(node, KVNode)
        return self.cost.prefill(node.start, node.stop)

    def _span(self, value: int) -> int:
        node = self.live.graph.nodes[value]
        assert isinstance(node, KVNode)
        return node.stop - node.start

    def _leave(self, value: int, step: int) -> None:
        """The value gives its place up; what it built on may be a leaf now."""
        live = self.live
        pool = self.pools[live.worker[value]]
        self.resident[value] = 0
        pool.used -= live.blocks[value]
        pool.victims.withdraw(value)
        if (at := live.prefix[value]) >= 0:
            self.children[at] -= 1
            self._offer(at, step)

    def _activate(self, value: int) -> None:
        while value >= 0:
            self.active[value] += 1
            if self.active[value] > 1:
                return
            self.count[value] += 1
            self.pools[self.live.worker[value]].victims.withdraw(value)
            value = self.live.prefix[value]

    def _deactivate(self, value: int, step: int) -> None:
        while value >= 0:
            self.active[value] -= 1
            if self.active[value]:
                return
            self.used[value] = step - 1
            self._offer(value, step)
            value = self.live.prefix[value]

    # --- victims ---

    def _offer(self, value: int, step: int) -> None:
        """Makes the value a candidate for eviction before `step`, if it is one."""
        live = self.live
        if not self.resident[value] or self.active[value] or self.children[value]:
            return
        if live.last[value] < step or self.protected.get(value, -1) >= step:
            return
        uses = self.uses[value]
        while uses[0][0] < step:
            heappop(uses)
        next_use, user = uses[0]
        pool = self.pools[live.worker[value]]
        entry = Entry(
            size=max(live.blocks[value], 1),
            cost=self._seconds(value),
            inserted=self.inserted[value],
            used=self.used[value],
            uses=self.count[value],
            next_use=next_use,
        )
        # what a request needs next for itself goes last: most of the time it is needed at once
        own = self.request[user] == self.request[value] and user != value
        pool.victims.offer(value, (own, *pool.policy.rank(entry)))

    def _make_room(self, pool: Pool, worker: int, step: int) -> None:
        """Sends values away, in the order of the policy, until the step fits."""
        refused: list[tuple[int, tuple[float, ...]]] = []
        while pool.used > pool.capacity:
            found = pool.victims.pop()
            if found is None:
                raise self._no_room(pool, worker, step, bool(refused))
            rank, value = found
            away = self._send_away(pool, worker, value, step)
            if away is None:
                refused.append((value, rank))
                continue
            pool.policy.evicted(rank[1:])
            self.away[value] = away
            if (at := self.live.prefix[value]) >= 0:
                heappush(self.uses[at], (away.next_use, value))
            self._leave(value, step)
        for value, rank in refused:
            if self.resident[value]:
                pool.victims.offer(value, rank)

    def _send_away(self, pool: Pool, worker: int, value: int, step: int) -> Away | None:
        """How the value leaves, by the cheapest way there is; None when there is none."""
        blocks, next_use = self.live.blocks[value], self.uses[value][0][0]
        node = self.live.graph.nodes[value]
        assert isinstance(node, KVNode)
        if (store := self._cached(pool, value)) >= 0:
            pool.room[store] -= blocks
            pool.least[store] -= blocks
            return Away(-1, store, next_use)
        drop, since = self._droppable(value), self.steps.before(step, worker)
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

    def _droppable(self, value: int) -> bool:
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
        return inside and whole and (single or value not in self.copied) and not self._fixed(value)

    def _fixed(self, value: int) -> bool:
        """Whether the step that needs the value next runs a decode that a move copies later: it
        must stay whole, so no step can be put in there."""
        if not self.copied_decodes:
            return False
        next_use = self.uses[value][0][0] if value not in self.away else self.away[value].next_use
        return any(first < next_use <= end for first, end in self.copied_decodes)

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
            if away.since >= 0 and self.live.worker[value] == worker and self._droppable(value)
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

    def _no_room(self, pool: Pool, worker: int, step: int, stuck: bool) -> SageIRError:
        """What runs in the step is too much, or what waits can neither be copied nor dropped."""
        name = self.target.workers[worker].name
        what = "what runs in it needs" if not stuck else "what cannot leave needs"
        return SageIRError(
            Diagnostic(
                f"step {step} of worker {name!r} does not fit the device tier of "
                f"{pool.capacity} blocks: {what} {pool.used}",
                help="run 'schedule' with this target first"
                if not stuck
                else "enlarge a lower tier, so that what waits has a place to go",
            )
        )
