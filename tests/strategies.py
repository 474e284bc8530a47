"""Hypothesis strategies for verifier-valid graphs of every stage: what the tests of passes draw.

`graphs()` draws prompts with shared prefixes, sessions, tenants, cache lines, tensor parallelism,
several workers, round trips over the host, split decodes, and (`scheduled`) a schedule of it all.
"""

from collections.abc import Callable, Sequence
from typing import Any

from attrs import define, evolve, field
from hypothesis import strategies as st

from sagellm_ir.graph import STAGES, CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.nodes import AllReduce, Decode, IRNode, KVFetch, KVMigrate, KVNode, Prefill
from sagellm_ir.target import DEVICE, HOST, Target, Tier, Worker
from tests.scheduling import schedule

__all__ = ["graphs", "requests", "targets"]

Draw = Callable[[st.SearchStrategy[Any]], Any]

_NAMES = st.sampled_from(("r", "chat-", "a b ", 'q"', "ü", "x.y"))


@st.composite
def targets(draw: Draw, max_workers: int = 3, max_tp: int = 2) -> Target:
    """Targets with room for whatever `graphs` draws."""
    count = draw(st.integers(1, max_workers))
    return Target(
        block_size=draw(st.sampled_from((1, 2, 4, 16))),
        max_tokens=draw(st.sampled_from((128, 2048))),
        max_batch=draw(st.sampled_from((8, 64))),
        max_loops=draw(st.integers(1, 16)),
        tp=draw(st.integers(1, max_tp)),
        mixed=draw(st.booleans()),
        tiers=(Tier(DEVICE, 4096), Tier(HOST, 16384, bandwidth=draw(st.floats(1e6, 1e12)))),
        workers=tuple(Worker(f"w{i}") for i in range(count)),
    )


@st.composite
def requests(
    draw: Draw, block_size: int = 16, max_count: int = 6, max_blocks: int = 4
) -> tuple[RequestDecl, ...]:
    """Requests whose prompts share prefixes, some of them turns of one session."""
    prefix = draw(_NAMES)
    found: list[RequestDecl] = []
    fresh = 0
    for number in range(draw(st.integers(1, max_count))):
        parent = draw(st.sampled_from((None, *found)))
        base: tuple[int, ...] = ()
        space: dict[str, Any] = {
            "tenant": draw(st.sampled_from((None, None, None, "acme"))),
            "adapter": draw(st.sampled_from((None, None, None, "lora"))),
        }
        if parent:
            base = parent.blocks[: draw(st.integers(0, len(parent.blocks)))]
            space = {"tenant": parent.tenant, "adapter": parent.adapter}
        own = draw(st.integers(0, max_blocks))
        blocks = (*base, *range(fresh, fresh + own))
        fresh += own
        tail = draw(st.integers(0 if blocks else 1, block_size - 1)) if block_size > 1 else 0
        if not blocks and not tail:
            blocks, fresh = (fresh,), fresh + 1
        found.append(
            RequestDecl(
                f"{prefix}{number}",
                prompt_len=len(blocks) * block_size + tail,
                blocks=blocks,
                max_new_tokens=draw(st.integers(1, 20)),
                arrival=float(number) * draw(st.sampled_from((0.0, 0.5))),
                priority=draw(st.integers(-1, 1)),
                deadline=draw(st.sampled_from((None, None, 9.5))),
                session=draw(st.sampled_from((None, None, "s0"))),
                **space,
            )
        )
    return tuple(found)


@st.composite
def graphs(
    draw: Draw,
    stages: Sequence[str] = STAGES,
    max_requests: int = 6,
    max_workers: int = 3,
    max_tp: int = 2,
    shared: bool | None = None,
) -> IRGraph:
    """Valid graphs.

    Args:
        draw: given by Hypothesis.
        stages: which stages to draw from.
        max_requests: requests of a graph, at most.
        max_workers: workers of the target, at most.
        max_tp: tensor-parallel ranks, at most.
        shared: whether prefixes are shared already, as after `prefix-dedup`; None draws it.
    """
    stage = draw(st.sampled_from(tuple(stages)))
    target = draw(targets(max_workers, max_tp))
    declared = draw(requests(target.block_size, max_requests))
    if stage == "scheduled":  # nothing here cuts a prefill that no step has room for
        longest = max((request.prompt_len for request in declared), default=0)
        target = evolve(target, max_tokens=max(target.max_tokens, longest))
    share = draw(st.booleans()) if shared is None else shared
    placed = stage == "placed" or (stage == "scheduled" and draw(st.booleans()))
    builder = _Builder(draw, target, declared, share, placed)
    cache = builder.draw_cache()
    for request in declared:
        builder.serve(request)
    graph = IRGraph(
        draw(st.sampled_from(("main", "a graph", "g-1"))),
        target=target,
        requests=declared,
        nodes=tuple(builder.nodes),
        cache=cache,
        stage="placed" if placed else "built",
    )
    return (
        schedule(graph, lambda options: draw(st.sampled_from(options)))
        if (stage == "scheduled")
        else graph
    )


@define
class _Builder:
    """Builds the nodes of a graph request by request."""

    draw: Draw
    target: Target
    requests: tuple[RequestDecl, ...]
    share: bool
    placed: bool
    nodes: list[IRNode] = field(factory=list)
    cached: set[int] = field(factory=set)
    values: list[KVNode] = field(factory=list)
    """Values that end at a block boundary inside a prompt, on the device."""
    turns: dict[str, str] = field(factory=dict)
    """The last decode of each session."""

    def draw_cache(self) -> tuple[CachedBlocks, ...]:
        """Cache lines with the first blocks of some request."""
        blocks = self.draw(st.sampled_from(self.requests)).blocks
        count = self.draw(st.integers(0, len(blocks)))
        if not count:
            return ()
        self.cached = set(blocks[:count])
        return tuple(CachedBlocks(tier, blocks=blocks[:count]) for tier in (DEVICE, HOST))

    def add(self, node: IRNode, worker: str | None) -> Any:
        node = evolve(node, worker=worker)
        self.nodes.append(node)
        return node

    def name(self, stem: str) -> str:
        return f"{stem}.{len(self.nodes)}"

    def worker(self) -> str | None:
        if not self.placed:
            return None
        return str(self.draw(st.sampled_from([worker.name for worker in self.target.workers])))

    def serve(self, request: RequestDecl) -> None:
        """The nodes of one request: what it shares, its prefills, its decodes."""
        worker = self.worker()
        last = self.shared_prefix(request, worker)
        after = (self.turns[request.session],) if request.session in self.turns else ()
        last = self.prefills(request, last, worker, after)
        home = self.worker()
        if home != worker:
            last = self.migrate_chain(last, home)
        self.decodes(request, last, home)

    def shared_prefix(self, request: RequestDecl, worker: str | None) -> KVNode | None:
        """A cached or shared value that the request can start from, which leaves a token over."""
        size = self.target.block_size
        most = (request.prompt_len - 1) // size
        hit = 0
        while hit < most and request.blocks[hit] in self.cached:
            hit += 1
        if hit and self.draw(st.booleans()):
            stop = self.draw(st.integers(1, hit)) * size
            tier = self.draw(st.sampled_from((DEVICE, HOST)))
            name = self.name(f"{request.id}.hit")
            return self.keep(self.add(KVFetch(name, request.id, 0, stop, src=tier), worker))
        if not self.share:
            return None
        by_id = {other.id: other for other in self.requests}
        fits = [
            value
            for value in self.values
            if value.worker == worker
            and value.stop <= most * size
            and by_id[value.request].blocks[: value.stop // size]
            == request.blocks[: value.stop // size]
        ]
        found: KVNode | None = self.draw(st.sampled_from((None, *fits)))
        return found

    def keep(self, value: KVNode) -> KVNode:
        if value.stop % self.target.block_size == 0:
            self.values.append(value)
        return value

    def prefills(
        self, request: RequestDecl, last: KVNode | None, worker: str | None, after: tuple[str, ...]
    ) -> KVNode:
        """The rest of the prompt in one to three chunks, some of them over the host and back."""
        stop = last.stop if last else 0
        inner = st.integers(stop + 1, request.prompt_len)
        cuts = {
            *(self.draw(inner) for _ in range(self.draw(st.integers(0, 2)))),
            request.prompt_len,
        }
        for cut in sorted(cuts):
            operands = (last.name,) if last else ()
            name = self.name(f"{request.id}.p")
            node = Prefill(name, request.id, stop, cut, operands=operands, after=after)
            computed = self.add(node, worker)
            self.reduce(computed)
            after, stop = (), cut
            if self.draw(st.integers(0, 5)) == 0 and cut % self.target.block_size == 0:
                computed = self.round_trip(computed, last, worker)
            last = self.keep(computed)
        assert last
        return last

    def round_trip(self, value: KVNode, prefix: KVNode | None, worker: str | None) -> Any:
        """The value copied to the host and fetched again."""
        span = (value.request, value.start, value.stop)
        down = self.add(KVMigrate(self.name("spill"), *span, operands=(value.name,)), worker)
        operands = (down.name, *((prefix.name,) if prefix else ()))
        return self.add(KVFetch(self.name("back"), *span, operands=operands), worker)

    def migrate_chain(self, value: KVNode, worker: str | None) -> KVNode:
        """The value and all its prefixes copied to another worker's device."""
        by_name = {node.name: node for node in self.nodes}
        chain: list[Any] = [value]
        while chain[-1].prefix:
            chain.append(by_name[chain[-1].prefix])
        last: Any = None
        for part in reversed(chain):
            operands = (part.name, *((last.name,) if last else ()))
            # What is appended to the last block of a part is copied with it.
            inside = part.stop % self.target.block_size and part is not value
            after = (value.name,) if inside else ()
            span = (part.request, part.start, part.stop)
            node = KVMigrate(self.name("move"), *span, operands=operands, after=after, to=DEVICE)
            last = self.add(node, worker)
        return last  # type: ignore[no-any-return]  # a chain is not empty

    def decodes(self, request: RequestDecl, last: KVNode, worker: str | None) -> None:
        """The answer, in one or two decodes."""
        start = request.prompt_len
        middle = self.draw(st.integers(start + 1, request.stop))
        for stop in sorted({middle, request.stop}):
            name = self.name(f"{request.id}.d")
            node = Decode(name, request.id, start, stop, operands=(last.name,))
            last = self.add(node, worker)
            self.reduce(last)
            start = stop
        if request.session:
            self.turns[request.session] = last.name

    def reduce(self, node: KVNode) -> None:
        """The collective of a forward, when the model is spread over ranks."""
        if self.target.tp > 1:
            rows = node.stop - node.start if isinstance(node, Prefill) else 1
            model = self.target.model
            payload = rows * model.hidden * model.dtype_bytes
            name = self.name("sum")
            collective = AllReduce(
                name, operands=(node.name,), bytes=payload, calls=2 * model.layers
            )
            self.add(collective, node.worker)
