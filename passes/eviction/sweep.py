"""The sweep: which values leave the device, when, how, and when they come back.

KV memory over a schedule is a register file over a program: values are live in ranges, a value
that finds no room splits the range of another one, and the split costs a store and a load, or
computing the value again (P. Briggs, K. Cooper, L. Torczon, "Rematerialization", PLDI 1992). Two
things differ: a use needs the whole prefix chain at once, so what leaves are leaves of the
resident forest and what returns comes from the root on; and a policy may be blind to the future.
"""

from collections import defaultdict
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt
from attrs import frozen

from sagellm_ir.cost import CostModel
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.nodes import KVNode
from sagellm_ir.passes.eviction.live import Live, peaks
from sagellm_ir.passes.eviction.steps import StepFacts
from sagellm_ir.passes.eviction.ways import Away, Pool, Ways
from sagellm_ir.passes.kv_policy import Entry, make_policy

__all__ = ["Away", "Batch", "Sweep"]


@frozen
class Batch:
    """What comes back in one step, roots first, each with how it had left."""

    step: int
    values: tuple[tuple[int, Away], ...]


class Sweep:
    """One run over the steps of a graph. Values are node indexes."""

    def __init__(self, live: Live, steps: StepFacts, policy: str, spill: str) -> None:
        self.live = live
        self.steps = steps
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
        self.ways = Ways(live, steps, spill)
        self.away = self.ways.away
        self.batches: list[Batch] = []
        self.request = [getattr(node, "request", "") for node in live.graph.nodes]
        most, workers = peaks(live.graph), range(len(self.target.workers))
        self.pools = [self._pool(worker, policy, most) for worker in workers]
        self.uses = self._uses()
        """By value: heap of what will start, or come back, on top of it: step, node."""
        self.protected = self._protected()
        """By value: while it must stay for another worker that copies it, or what builds on it:
        the step in which the copied value starts, that of the copy."""
        self.held = self._held()
        """By node: the device value that keeps its chain in place while the node runs, or -1."""
        self.seconds: dict[int, float] = {}
        """By value: what it takes to compute it again, once that was asked for."""

    def _pool(self, worker: int, policy: str, peaks: npt.NDArray[np.int64]) -> Pool:
        live = self.live
        pool = Pool(self.target.tiers[live.device].blocks, make_policy(policy))
        for tier, spec in enumerate(self.target.tiers):
            if tier != live.device:
                own = int(peaks[tier, worker])
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

    def _protected(self) -> dict[int, list[tuple[int, int]]]:
        live = self.live
        protected: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for i, value in enumerate(live.source):
            if value >= 0 and live.worker[value] != live.worker[i]:
                during = live.step[value], live.step[i]
                while value >= 0:
                    protected[value].append(during)
                    value = live.prefix[value]
        return protected

    def _held(self) -> list[int]:
        live = self.live
        held = list(range(len(live.step)))
        for i, tier in enumerate(live.tier):
            if tier != live.device:
                source = live.source[i]
                held[i] = source if source >= 0 and live.tier[source] == live.device else -1
        return held

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
        for value, times in self.protected.items():
            for _, copied in times:
                released[copied].append(value)
        for value in live.pins:
            self._settle(value, -1)
        for value in live.pins:
            self._offer(value, 0)
        for step in range(len(live.graph.loops)):
            if step in starts:
                self._start(step, starts[step])
            for node in ends.get(step, ()):
                if (held := self.held[node]) >= 0:
                    self._deactivate(held, step + 1)
            for value in deaths.get(step, ()):
                if self.resident[value]:
                    self._leave(value, step + 1)
            for value in released.get(step, ()):
                self._offer(value, step + 1)

    def _start(self, step: int, nodes: list[int]) -> None:
        """What starts in a step takes its place, and so does what it builds on."""
        live, back = self.live, set[int]()
        for node in nodes:
            at = self.held[node]
            while at >= 0 and not self.resident[at]:
                self._settle(at, step)
                if at in self.away:
                    back.add(at)
                at = live.prefix[at]
        for node in nodes:
            if (at := self.held[node]) >= 0:
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
        pool = self.pools[live.worker[value]]
        self.resident[value] = 1
        pool.used += live.blocks[value]
        if value in self.away:
            computed = self.away[value].store < 0
            self.ways.copyable[value] = step + computed
            if computed and self.ways.span(value) > self.target.max_tokens:
                self.ways.copyable[value] = len(
                    live.graph.loops
                )  # several nodes: never copied whole
        self.inserted[value] = self.used[value] = step
        self.count[value] = 0
        if (at := live.prefix[value]) >= 0:
            self.children[at] += 1
            pool.victims.withdraw(at)

    def _seconds(self, value: int) -> float:
        """What it takes to compute the value again."""
        seconds = self.seconds.get(value)
        if seconds is None:
            node = self.live.graph.nodes[value]
            assert isinstance(node, KVNode)
            self.seconds[value] = seconds = self.cost.prefill(node.start, node.stop)
        return seconds

    def _leave(self, value: int, step: int) -> None:
        """The value gives its place up; what it built on may be a leaf now."""
        live = self.live
        pool = self.pools[live.worker[value]]
        self.resident[value] = 0
        pool.used -= live.blocks[value]
        pool.victims.withdraw(value)
        if (at := live.prefix[value]) >= 0:
            self.children[at] -= 1
            if not self.children[at] and not self.active[at]:
                self._offer(at, step)

    def _activate(self, value: int) -> None:
        active, prefix = self.active, self.live.prefix
        self.pools[self.live.worker[value]].victims.withdraw(value)
        while value >= 0:
            active[value] += 1
            if active[value] > 1:
                return
            self.count[value] += 1
            value = prefix[value]

    def _deactivate(self, value: int, step: int) -> None:
        active, prefix, last = self.active, self.live.prefix, self.live.last
        while value >= 0:
            active[value] -= 1
            if active[value]:
                return
            self.used[value] = step - 1
            if not self.children[value] and last[value] >= step:
                self._offer(value, step)
            value = prefix[value]

    # --- victims ---

    def _offer(self, value: int, step: int) -> None:
        """Makes the value a candidate for eviction before `step`, if it is one."""
        live = self.live
        if not self.resident[value] or self.active[value] or self.children[value]:
            return
        times = self.protected.get(value, ())
        if live.last[value] < step or any(made < step <= copied for made, copied in times):
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
            away = self.ways.send_away(pool, value, step, self.uses[value][0][0])
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
