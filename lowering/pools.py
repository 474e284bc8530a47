"""`Pools`: the physical blocks of every tier and worker while a graph is lowered."""

from collections.abc import Collection, Iterable, Sequence

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering.flat import NONE, FlatGraph
from sagellm_ir.lowering.plan import KVFree, LiveBlock, Resident
from sagellm_ir.lowering.pool import Pool
from sagellm_ir.nodes import KVFetch
from sagellm_ir.target import DEVICE

__all__ = ["Pools"]


class Pools:
    """Blocks of each value, and of each tier's cache.

    Args:
        resident: where cached content is; None puts it in the first blocks of its tier.
        live: unfinished blocks of requests that go on.
        retain: keep the prompt blocks of dead values as cache.

    Raises:
        SageIRError: the cache does not fit, or `resident` does not hold what the graph reads.
    """

    def __init__(
        self,
        graph: IRGraph,
        flat: FlatGraph,
        resident: Sequence[Resident] | None,
        live: Sequence[LiveBlock],
        retain: bool,
    ) -> None:
        self.own: list[tuple[int, ...]] = [()] * len(graph.nodes)
        """The physical blocks each node owns, once it has run."""
        self._graph, self._flat, self._retain = graph, flat, retain
        self._pinned: set[int] = set()
        """Fetches from the device, which own cached blocks."""
        self._default = graph.target.workers[0].name
        self._pools = {
            (tier.name, worker.name): Pool(tier.blocks)
            for tier in graph.target.tiers
            for worker in graph.target.workers
        }
        self._home = [self._pools[place] for place in zip(flat.tier, flat.worker, strict=True)]
        """The pool each node's blocks are in."""
        self._read: list[int] = []
        """Fetches from cache off the device, whose pins end before the next step."""
        self._reach = self._filled() if retain else []
        self._load(_first_blocks(graph) if resident is None else resident)
        self._live = {block.request: block for block in live}
        for worker in {block.worker: None for block in live}:
            blocks = [block.block for block in live if block.worker == worker]
            self._reserve(DEVICE, worker, blocks)
        self._pin()

    def allocate(self, i: int, count: int | None = None) -> None:
        """Take the blocks node `i` owns, or `count`.

        Raises:
            SageIRError: the tier is full.
        """
        if count is None:
            count = self._flat.blocks[i]
        if count:
            self.own[i] = self._home[i].take(count) or self._squeeze(i, count)

    def resume(self, i: int, name: str) -> int:
        """Allocate for prefill `i` of request `name`; if that starts in the request's live block,
        take that block too. Returns where the tokens to compute begin."""
        flat = self._flat
        start, live = flat.start[i], self._live.get(name)
        if live is None:
            self.allocate(i)
            return start
        size = self._graph.target.block_size
        here = (live.worker or self._default) == flat.worker[i]
        if not here or start != live.tokens // size * size:
            self.allocate(i)
            return start
        if flat.stop[i] <= live.tokens:
            self.drop_live()
            self.allocate(i)
            return start
        del self._live[name]
        more = flat.blocks[i] - 1
        rest = (self._home[i].take(more) or self._squeeze(i, more)) if more else ()
        self.own[i] = (live.block, *rest)
        return live.tokens

    def drop_live(self) -> None:
        """Give up the live blocks that nothing has resumed: their tokens are computed again."""
        for live in self._live.values():
            self._pools[DEVICE, live.worker or self._default].give((live.block,))
        self._live.clear()

    def _squeeze(self, i: int, count: int) -> tuple[int, ...]:
        """Take blocks for node `i` although too few are free: live blocks give way."""
        pool = self._home[i]
        self.drop_live()
        blocks = pool.take(count)
        if blocks is None:
            raise self._full(i, pool)
        return blocks

    def pin(self, i: int) -> None:
        """Let fetch `i` from the device own the cached blocks it hits."""
        self.own[i] = self.cached(i)
        self._pinned.add(i)

    def cached(self, i: int) -> tuple[int, ...]:
        """Where the cache that fetch `i` reads is."""
        pool = self._source_pool(i)
        where = tuple(pool.block_of[content] for content in self._contents(i))
        if self._source(i) != DEVICE:
            self._read.append(i)
        return where

    def release(self, dead: Iterable[int]) -> None:
        """Give back what dead values own, and unpin what was read."""
        if self._read:
            for i in self._read:
                self._unpin(i)
            self._read.clear()
        own, home, pinned = self.own, self._home, self._pinned
        for i in dead:
            if pinned and i in pinned:
                self._unpin(i)
            elif self._retain:
                self._keep(i)
            elif blocks := own[i]:
                home[i].give(blocks)

    def take_frees(self, worker: str) -> tuple[KVFree, ...]:
        """What was given back since the last call, as seen from a step of `worker`."""
        frees = []
        for (tier, owner), pool in self._pools.items():
            if pool.freed:
                blocks = tuple(sorted(pool.freed))
                frees.append(KVFree(tier, blocks, None if owner == worker else owner))
                pool.freed.clear()
        return tuple(frees)

    def content(self) -> tuple[Resident, ...]:
        """The cache, pinned content last."""
        found = []
        for (tier, owner), pool in self._pools.items():
            if ids := pool.content():
                blocks = tuple(pool.block_of[content] for content in ids)
                found.append(Resident(tier, ids, blocks, None if owner == self._default else owner))
        return tuple(found)

    def _load(self, resident: Sequence[Resident]) -> None:
        for held in resident:
            pool = self._pools.get((held.tier, held.worker or self._default))
            if pool is None or len(held.ids) != len(held.blocks):
                raise _bad_cache(f"of tier {held.tier!r} names no tier of a worker of the target")
            self._reserve(held.tier, held.worker, held.blocks)
            pool.block_of.update(zip(held.ids, held.blocks, strict=True))
            pool.idle.update(dict.fromkeys(held.ids))

    def _reserve(self, tier: str, worker: str | None, blocks: Collection[int]) -> None:
        pool = self._pools[tier, worker or self._default]
        try:
            pool.reserve(blocks)
        except ValueError:
            raise _bad_cache(f"of tier {tier!r} does not fit its {pool.capacity} blocks") from None

    def _pin(self) -> None:
        flat = self._flat
        for moves in flat.moves:
            for i in moves:
                if flat.source[i] != NONE:
                    continue
                pool = self._source_pool(i)
                for content in self._contents(i):
                    if content not in pool.block_of:
                        name = flat.kv(i).name
                        raise _bad_cache(f"lacks block {content}, which %{name} fetches")
                    pool.pin(content)

    def _unpin(self, i: int) -> None:
        pool = self._source_pool(i)
        # Backwards: of a chain, what comes last is dropped first.
        for content in reversed(self._contents(i)):
            pool.unpin(content)

    def _filled(self) -> list[int]:
        """How far the KV of each node's last block reaches: a later node may append to it."""
        flat = self._flat
        reach = flat.stop.copy()
        for i in range(len(reach) - 1, NONE, -1):
            parent = flat.parent[i]
            if parent != NONE and reach[parent] < reach[i]:
                reach[parent] = reach[i]
        return reach

    def _keep(self, i: int) -> None:
        first = self._flat.first[i]
        pool, size = self._home[i], self._graph.target.block_size
        contents = self._graph.request[self._flat.request[i]].blocks
        whole = min(len(contents), self._reach[i] // size)
        for at in range(first + len(self.own[i]) - 1, first - 1, -1):
            block = self.own[i][at - first]
            if at < whole:
                pool.keep(contents[at], block)
            else:
                pool.give((block,))

    def _contents(self, i: int) -> tuple[int, ...]:
        first = self._flat.first[i]
        return self._graph.request[self._flat.request[i]].blocks[
            first : first + self._flat.blocks[i]
        ]

    def _source(self, i: int) -> str:
        node = self._flat.kv(i)
        assert isinstance(node, KVFetch), node
        return node.src

    def _source_pool(self, i: int) -> Pool:
        return self._pools[self._source(i), self._flat.worker[i]]

    def _full(self, i: int, pool: Pool) -> SageIRError:
        node = self._flat.kv(i)
        free = pool.free_blocks + len(pool.idle)
        return SageIRError(
            Diagnostic(
                f"KV does not fit: in step {node.step}, %{node.name} needs "
                f"{self._flat.blocks[i]} blocks of tier {node.tier!r} on worker "
                f"{self._flat.worker[i]!r}, and {free} of {pool.capacity} are free",
                node.loc,
                help="run the pass 'evict' after 'schedule', or give the tier more blocks",
            )
        )


def _first_blocks(graph: IRGraph) -> tuple[Resident, ...]:
    """Cached content in the first blocks of its tier, in the order of the graph's lines."""
    used: dict[tuple[str, str], int] = {}
    resident = []
    for line in graph.cache:
        # A line without a worker says what every worker holds.
        for worker in [line.worker] if line.worker else [w.name for w in graph.target.workers]:
            start = used.get((line.tier, worker), 0)
            stop = used[line.tier, worker] = start + len(line.blocks)
            resident.append(Resident(line.tier, line.blocks, tuple(range(start, stop)), worker))
    return tuple(resident)


def _bad_cache(message: str) -> SageIRError:
    return SageIRError(Diagnostic(f"the cache {message}"))
