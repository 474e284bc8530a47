"""`explain_request`: why a request waited, what it shared, what was evicted for it."""

from collections import Counter

from attrs import frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering.lower import lower
from sagellm_ir.lowering.render import plan_bars
from sagellm_ir.nodes import Decode, KVFetch, KVMigrate, KVNode, Prefill
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.passes.schedule import Schedule
from sagellm_ir.passes.scheduling.timeline import Limit

__all__ = ["Explanation", "Move", "Span", "explain_request"]


@frozen
class Span:
    """How the KV of tokens `[start, stop)` of the request came to be."""

    start: int
    stop: int
    node: str
    how: str
    """`computed`, `shared` (another request's prefill), `cached`, `fetched` or `migrated`."""
    step: int
    by: str
    """The request that the node belongs to."""
    others: tuple[str, ...]
    """Other requests that read it."""


@frozen
class Move:
    """KV that was moved out of the way, or made again, in a step in which the request began work."""

    step: int
    node: str
    what: str
    """`spilled`, `fetched back` or `computed again`."""
    blocks: int


@frozen
class Explanation:
    """One request's way through the compiler."""

    first: int
    last: int
    """Steps of the plan: the first and the last that it has a row in."""
    start: float
    end: float
    """Predicted seconds by the plan's clock, which `plan_rows` keeps: of the first step's start and the
    last one's end. The scheduler's own estimates, by which it chose, do not know of groups."""
    waited: Counter[Limit]
    """Steps between its arrival and its admission, by what held it back in each."""
    spans: tuple[Span, ...]
    """Its prompt, in order."""
    evictions: tuple[Move, ...]
    decode_steps: tuple[int, int]
    """First and last step of its decodes."""


def explain_request(graph: IRGraph, pipeline: Pipeline, request: str) -> Explanation:
    """Compiles a graph to a plan and follows one request.

    Args:
        graph: built.
        pipeline: holds `schedule`.
        request: its id.

    Raises:
        SageIRError: no such request, or the pipeline does not schedule.
    """
    if request not in graph.request:
        message = f"no request is called {request!r}"
        raise SageIRError(Diagnostic(message, help=suggest(request, graph.request)))
    schedule = next((item for item in pipeline if isinstance(item, Schedule)), None)
    if schedule is None:
        raise SageIRError(Diagnostic(f"pipeline '{pipeline}' has no pass 'schedule'"))
    before = PassManager(pipeline.before(schedule.name)).run(graph)
    after = PassManager(pipeline).run(graph)
    [trace] = (item for item in schedule.trace(before) if item.request == request)
    decodes = [n for n in after.nodes if isinstance(n, Decode) and n.request == request]
    steps = [step for node in decodes for step in (node.step, node.until) if step is not None]
    bars = [bar for bar in plan_bars(lower(after)) if bar.request == request]
    return Explanation(
        bars[0].first,
        bars[-1].last,
        bars[0].start,
        bars[-1].stop,
        trace.waited,
        _spans(after, request),
        _evictions(after, request),
        (min(steps), max(steps)),
    )


def _spans(graph: IRGraph, request: str) -> tuple[Span, ...]:
    """The prefix chain of the request's first decode."""
    node: KVNode = next(n for n in graph.nodes if isinstance(n, Decode) and n.request == request)
    chain: list[KVNode] = []
    while node.prefix is not None:
        ancestor = graph.by_name[node.prefix]
        assert isinstance(ancestor, KVNode)
        node = ancestor
        chain.append(node)
    readers = _readers(graph)
    return tuple(
        Span(
            node.start,
            node.stop,
            node.name,
            _how(node, request),
            node.step or 0,
            node.request,
            tuple(sorted(readers[node.name] - {request})),
        )
        for node in reversed(chain)
    )


def _how(node: KVNode, request: str) -> str:
    if isinstance(node, KVFetch):
        return "cached" if node.source is None else "fetched"
    if isinstance(node, KVMigrate):
        return "migrated"
    return "computed" if node.request == request else "shared"


def _readers(graph: IRGraph) -> dict[str, set[str]]:
    """For each KV node, the requests with it in the prefix chain of one of their nodes."""
    readers: dict[str, set[str]] = {node.name: set() for node in graph.nodes}
    for node in reversed(graph.nodes):
        if isinstance(node, KVNode):
            if isinstance(node, Decode) or not readers[node.name]:
                readers[node.name].add(node.request)
            if node.prefix is not None:
                readers[node.prefix] |= readers[node.name]
    return readers


def _evictions(graph: IRGraph, request: str) -> tuple[Move, ...]:
    """What `evict` put into the steps in which the request's nodes start."""
    starts = {n.step for n in graph.nodes if isinstance(n, KVNode) and n.request == request}
    size = graph.target.block_size
    return tuple(
        Move(
            node.step or 0,
            node.name,
            _what(node),
            -(-node.stop // size) - -(-node.start // size),
        )
        for node in graph.nodes
        if isinstance(node, KVMigrate | KVFetch | Prefill)
        and node.origin is not None
        and node.origin.by == "evict"
        and node.step in starts
    )


def _what(node: KVNode) -> str:
    if isinstance(node, KVMigrate):
        return "spilled"
    return "fetched back" if isinstance(node, KVFetch) else "computed again"
