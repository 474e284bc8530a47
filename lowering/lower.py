"""`lower`: a scheduled `IRGraph` -> an `ExecutionPlan`.

Physical blocks come from liveness: a value's blocks are taken in its step and given back before
the first step after its last use. The work of a step is in proportion to what changes in it, plus
one copy of its batch when that changed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from sagellm_ir.collecting import no_collections
from sagellm_ir.cost import CostModel
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering.batch import Batch
from sagellm_ir.lowering.flat import NONE, FlatGraph
from sagellm_ir.lowering.plan import (
    Bind,
    Collective,
    ExecutionPlan,
    KVFree,
    KVMove,
    LiveBlock,
    PlanRequest,
    PlanStep,
    PrefillChunk,
    Resident,
)
from sagellm_ir.lowering.pools import Pools
from sagellm_ir.nodes import AllReduce, KVFetch, KVMigrate
from sagellm_ir.request import Sampling
from sagellm_ir.target import DEVICE

__all__ = ["lower", "lower_steps"]

GREEDY = Sampling()


@no_collections()
def lower(
    graph: IRGraph,
    tokens: Mapping[str, Sequence[int]] | None = None,
    sampling: Mapping[str, Sampling] | None = None,
    *,
    resident: Sequence[Resident] | None = None,
    live: Sequence[LiveBlock] = (),
    retain: bool = False,
) -> ExecutionPlan:
    """Assign blocks, and turn each scheduled step into a `PlanStep`.

    A last step without rows gives back what the step before it used.

    Args:
        graph: scheduled and verified.
        tokens: prompt token ids by request id; requests left out get none (a trace).
        sampling: how to draw tokens, by request id; greedy where left out.
        resident: where the content of the graph's `cache` lines is; left out, each tier holds it
            in its first blocks.
        live: unfinished blocks of requests that go on. A prefill that starts with such a block
            computes only the tokens behind those it holds; it is a loss, not an error, if none does.
        retain: keep the prompt blocks of dead values as cache, and free them only when their
            space is needed, least recently used first.

    Raises:
        SageIRError: the graph is not scheduled, or its KV does not fit its tiers.
    """
    return _Lowering(graph, resident, live, retain).plan(tokens or {}, sampling or {})


def lower_steps(
    graph: IRGraph,
    *,
    resident: Sequence[Resident] | None = None,
    live: Sequence[LiveBlock] = (),
    retain: bool = False,
) -> Iterator[PlanStep]:
    """The steps of the plan that `lower` makes, each made when it is asked for.

    Raises:
        SageIRError: see `lower`; KV that does not fit, at the step that it does not fit in.
    """
    return _Lowering(graph, resident, live, retain).steps()


class _Lowering:
    """One run of `lower`."""

    def __init__(
        self,
        graph: IRGraph,
        resident: Sequence[Resident] | None,
        live: Sequence[LiveBlock],
        retain: bool,
    ) -> None:
        if graph.stage != "scheduled":
            raise SageIRError(
                Diagnostic(
                    f"graph {graph.name!r} is {graph.stage}, and lowering needs a scheduled one",
                    help="run the pass 'schedule' last, and 'evict' after it when KV is short",
                )
            )
        self.graph, self.live = graph, tuple(live)
        self.flat = FlatGraph(graph)
        self.pools = Pools(graph, self.flat, resident, live, retain)
        self.cost = CostModel(graph.target)
        workers = [worker.name for worker in graph.target.workers]
        self.batches = {name: Batch(graph, self.flat, self.cost) for name in workers}
        self.fills = self.batches
        """By worker, the batch of steps with prefills: another one where decodes rest in them."""
        if not graph.target.mixed:
            self.fills = {name: Batch(graph, self.flat, self.cost) for name in workers}
        self.order = {request.id: number for number, request in enumerate(graph.requests)}
        self.bound: dict[str, int] = {}
        """For each request, the node its table reaches to."""
        self.answering: set[str] = set()
        """Requests that have started to decode."""

    def plan(
        self, tokens: Mapping[str, Sequence[int]], sampling: Mapping[str, Sampling]
    ) -> ExecutionPlan:
        """The plan of the whole graph."""
        resident = self.pools.content()
        steps = tuple(self.steps())
        requests = [
            PlanRequest(
                decl.id,
                max_new_tokens=decl.max_new_tokens,
                arrival=decl.arrival,
                priority=decl.priority,
                deadline=decl.deadline,
                adapter=decl.adapter,
                tenant=decl.tenant,
                session=decl.session,
                prompt_len=decl.prompt_len,
                tokens=tuple(tokens[decl.id]) if decl.id in tokens else None,
                sampling=sampling.get(decl.id, GREEDY),
                blocks=decl.blocks,
            )
            for decl in self.graph.requests
        ]
        retained = self.pools.content()
        name, target = self.graph.name, self.graph.target
        return ExecutionPlan(name, target, tuple(requests), steps, resident, self.live, retained)

    def steps(self) -> Iterator[PlanStep]:
        """All steps, in order; once."""
        worker, count = "", len(self.graph.loops)
        for index, loops in enumerate(self.graph.loops):
            step = self.step(index, loops)
            worker = step.worker
            yield step
        if count:
            self.pools.release(self.flat.dead[count])
            self.pools.drop_live()
            if frees := self.pools.take_frees(worker):
                yield PlanStep(count, worker, frees, loops=0)

    def step(self, index: int, loops: int) -> PlanStep:
        """One step: what ends, what moves, what is bound, what runs."""
        flat = self.flat
        worker = flat.step_worker[index]
        prefills, binds = flat.prefills[index], list[Bind]()
        batch = (self.fills if prefills else self.batches)[worker]
        self.pools.release(flat.dead[index])
        if ended := flat.ended[index]:
            self.end(ended)
        moves, seconds = self.move(flat.moves[index], worker)
        chunks = self.prefill(prefills, batch, binds) if prefills else ()
        if decodes := flat.decodes[index]:
            self.start(decodes, batch, binds)
        batch.settle()
        for i in flat.reduces[index]:
            node = self.graph.nodes[i]
            assert isinstance(node, AllReduce), node
            batch.reduces[i] = Collective(node.group, node.bytes, node.calls, node.fused)
        kv: tuple[KVMove | KVFree, ...] = (*self.pools.take_frees(worker), *moves)
        if not loops or not (chunks or batch.decode):
            return PlanStep(index, worker, kv, tuple(binds), loops=0, cost=round(seconds, 9))
        groups = batch.groups
        reduces = tuple(batch.reduces.values())
        seconds = round(seconds + batch.run(chunks, loops), 9)
        return PlanStep(
            index, worker, kv, tuple(binds), chunks, batch.decode, loops, groups, reduces, seconds
        )

    def end(self, ended: Iterable[int]) -> None:
        """Take out the decodes and collectives that ran for the last time."""
        flat = self.flat
        for i in ended:
            batch = self.batches[flat.worker[i]]
            if not flat.span[i]:
                batch = batch if i in batch.reduces else self.fills[flat.worker[i]]
                del batch.reduces[i]
            elif flat.forwards[i]:
                batch.part(i, flat.owner[i])

    def move(self, moves: Iterable[int], worker: str) -> tuple[list[KVMove], float]:
        """Fetches and migrates, in node order, and their seconds."""
        done: list[KVMove] = []
        seconds = 0.0
        for i in moves:
            node = self.graph.nodes[i]
            assert isinstance(node, KVFetch | KVMigrate), node
            source = self.flat.source[i]
            tier = node.src if isinstance(node, KVFetch) else self.flat.tier[source]
            if source == NONE and tier == DEVICE:
                self.pools.pin(i)
                continue
            origin = worker if source == NONE else self.flat.worker[source]
            blocks = self.pools.cached(i) if source == NONE else self.blocks(source, i)
            self.pools.allocate(i, len(blocks))
            if blocks:
                own = self.pools.own[i]
                other = None if origin == worker else origin
                done.append(KVMove(tier, node.tier, blocks, own, other, node.name))
                far = node.tier if tier == DEVICE else tier
                seconds += self.cost.transfer(len(blocks), far)
        return done, seconds

    def blocks(self, source: int, i: int) -> tuple[int, ...]:
        """The blocks of value `source` that node `i` copies: those that `i` itself owns."""
        first, count = self.flat.first[i], self.flat.blocks[i]
        if self.flat.tier[source] != DEVICE:
            own, at = self.pools.own[source], first - self.flat.first[source]
            return own[at : at + count]
        table = self.table(source, NONE)
        return table[first : first + count]

    def prefill(
        self, prefills: Sequence[int], batch: Batch, binds: list[Bind]
    ) -> tuple[PrefillChunk, ...]:
        """The chunks of a step, in request order."""
        flat, answering = self.flat, self.answering
        if len(prefills) == 1 and (name := flat.request[i := prefills[0]]) not in answering:
            begin = self.pools.resume(i, name)
            batch.chunk(i, flat.owner[i])
            batch.enter_chunks()
            self.bind(i, name, binds)
            return (PrefillChunk(name, begin, flat.stop[i]),)
        spans: dict[str, tuple[int, int]] = {}
        reached: dict[str, int] = {}
        for i in prefills:
            name = flat.request[i]
            if name in answering:
                name = self.heir(i)
            begin = self.pools.resume(i, name)
            reached[name] = i
            if name not in spans:
                spans[name] = begin, flat.stop[i]
                batch.chunk(i, self.order[name])
            else:
                # Neighbouring chunks of one request in one step are one chunk.
                begin, stop = spans[name]
                assert stop == flat.start[i], self.graph.nodes[i]
                spans[name] = begin, flat.stop[i]
        batch.enter_chunks()
        for name, i in reached.items():
            self.bind(i, name, binds)
        names = spans if len(spans) < 2 else sorted(spans, key=self.order.__getitem__)
        return tuple([PrefillChunk(name, *spans[name]) for name in names])

    def start(self, decodes: Iterable[int], batch: Batch, binds: list[Bind]) -> None:
        """Let requests join the batch."""
        flat = self.flat
        for i in decodes:
            name = flat.request[i]
            self.answering.add(name)
            if not flat.forwards[i] and flat.stop[i] == self.graph.request[name].stop:
                continue  # The prefill has given the only token, whose KV nobody writes or reads.
            self.pools.allocate(i)
            self.bind(i, name, binds)
            if flat.forwards[i]:
                batch.join(i, flat.owner[i])

    def heir(self, i: int) -> str:
        """The request that runs prefill `i`: its own, or a user of it once that one is decoding."""
        while (name := self.flat.request[i]) in self.answering:
            children = self.flat.children.get(i)
            if not children:
                break
            i = children[0]
        return name

    def bind(self, i: int, name: str, binds: list[Bind]) -> None:
        """Make the table of request `name` reach to node `i`: bind what is new or changed."""
        flat, parent, old = self.flat, self.flat.parent, self.bound.get(name, NONE)
        self.bound[name] = i
        if parent[i] == old:  # as nearly always
            if blocks := self.pools.own[i]:
                binds.append(Bind(name, flat.first[i], blocks))
            return
        first, at = i, parent[i]
        while at not in (old, NONE):
            first, at = at, parent[at]
        if at != old:
            # The table leaves the chain it had, some way up.
            kept = set()
            while old != NONE:
                kept.add(old)
                old = parent[old]
            first, at = NONE, i
            while at != NONE and at not in kept:
                first, at = at, parent[at]
        if first != NONE and (blocks := self.table(i, at)):
            binds.append(Bind(name, flat.first[first], blocks))

    def table(self, i: int, after: int) -> tuple[int, ...]:
        """The blocks of node `i` and its prefixes, back to but without node `after`."""
        own, parent = self.pools.own, self.flat.parent
        if parent[i] == after:
            return own[i]
        parts: list[tuple[int, ...]] = []
        while i != after:
            parts.append(own[i])
            i = parent[i]
        return tuple(chain.from_iterable(reversed(parts)))
