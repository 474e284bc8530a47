"""`IRGraph`: an immutable DAG of nodes in SSA form, with the requests and the target it is for."""

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from attrs import evolve, field, frozen

from sagellm_ir.nodes import IRNode, Location
from sagellm_ir.request import RequestInfo
from sagellm_ir.target import Target

if TYPE_CHECKING:
    import networkx as nx

    from sagellm_ir.columns import Columns
    from sagellm_ir.request_columns import RequestColumns

__all__ = ["STAGES", "CachedBlocks", "IRGraph", "RequestDecl"]

STAGES = ("built", "placed", "scheduled")
"""`built`: what to compute; `placed`: and on which worker; `scheduled`: and in which step.

`built` and `placed` graphs can be scheduled; a `scheduled` one keeps its placement.
"""


@frozen
class RequestDecl(RequestInfo):
    """A request as the IR sees it: how long its prompt is, and which blocks it is made of."""

    prompt_len: int = field(kw_only=True, metadata={"text": "prompt"})
    """Tokens of the prompt."""
    blocks: tuple[int, ...] = field(default=(), kw_only=True)
    """One id per full block of the prompt. Equal ids mean equal KV: an id stands for the chain
    hash of the block's tokens, everything before them, and the namespace."""
    loc: Location | None = field(default=None, kw_only=True, eq=False)

    @property
    def stop(self) -> int:
        """Tokens of prompt and answer together."""
        return self.prompt_len + self.max_new_tokens


@frozen
class CachedBlocks:
    """Blocks that a tier of the engine holds before the graph runs, least recently used first."""

    tier: str
    blocks: tuple[int, ...] = field(kw_only=True)
    worker: str | None = field(default=None, kw_only=True)


@frozen
class IRGraph:
    """An immutable DAG. Nodes stand in topological order: a definition precedes its uses.

    Derived indexes are computed once, on first use.
    """

    name: str = "main"
    target: Target = Target()
    requests: tuple[RequestDecl, ...] = ()
    nodes: tuple[IRNode, ...] = ()
    cache: tuple[CachedBlocks, ...] = ()
    stage: str = "built"
    loops: tuple[int, ...] = ()
    """Forwards of each step; empty unless scheduled."""

    @cached_property
    def columns(self) -> "Columns":
        """The fields of requests and nodes as arrays, for the verifier, passes and lowering."""
        from sagellm_ir.columns import Columns  # brings numpy

        return Columns(self)

    @cached_property
    def request_columns(self) -> "RequestColumns":
        """The fields of requests as arrays."""
        from sagellm_ir.request_columns import RequestColumns

        return RequestColumns(self.requests)

    @cached_property
    def by_name(self) -> dict[str, IRNode]:
        """Nodes by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def request(self) -> dict[str, RequestDecl]:
        """Requests by id."""
        return {request.id: request for request in self.requests}

    @cached_property
    def users(self) -> dict[str, list[IRNode]]:
        """For each name, the nodes that take it as an operand, in order."""
        users: dict[str, list[IRNode]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for operand in node.operands:
                users[operand].append(node)
        return users

    @cached_property
    def decode_loops(self) -> tuple[int, ...]:
        """By how much the decodes that run in each step advance: by its forwards.

        On a target that does not mix, decodes rest in a step with prefills: they advance by 0.
        """
        if self.target.mixed:
            return self.loops
        filled = set(self.columns.step[self.columns.is_prefill].tolist())
        return tuple(0 if step in filled else loops for step, loops in enumerate(self.loops))

    def replace(self, **changes: Any) -> "IRGraph":
        """A copy of this graph with some fields changed."""
        graph = evolve(self, **changes)
        if (columns := self._columns_made()) is None:
            return graph
        if graph.requests is self.requests:
            object.__setattr__(graph, "request_columns", columns.requests)
        if changes.keys() <= {"name", "stage"}:
            object.__setattr__(graph, "columns", columns.of(graph))
        return graph

    def _columns_made(self) -> "Columns | None":
        """The columns, if they were asked for before."""
        try:
            return cast("Columns", object.__getattribute__(self, "columns"))
        except AttributeError:
            return None

    def to_networkx(self) -> "nx.DiGraph[str]":
        """The nodes and their data (`kind="data"`) and order (`kind="order"`) edges."""
        import networkx as nx  # takes longer to import than all of the IR

        digraph: nx.DiGraph[str] = nx.DiGraph(name=self.name)
        for node in self.nodes:
            digraph.add_node(node.name, node=node)
        for node in self.nodes:
            digraph.add_edges_from(((name, node.name) for name in node.operands), kind="data")
            digraph.add_edges_from(((name, node.name) for name in node.after), kind="order")
        return digraph
