"""`schedule`: gives every node a step."""

from typing import ClassVar

from attrs import frozen

from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.scheduling.apply import apply
from sagellm_ir.passes.scheduling.problem import flatten
from sagellm_ir.passes.scheduling.simulate import simulate
from sagellm_ir.passes.scheduling.timeline import RequestTrace, explain

__all__ = ["Schedule"]


@frozen
class Schedule(Pass):
    """Gives every node a step, by simulating continuous batching in virtual time.

    Law: the nodes and what they compute stay as they are, but that a prefill may be cut where a
    step is full: into a chain `%x.0`, `%x.1`, ..., `%x`. A step keeps to `max_tokens` and
    `max_batch`, and all KV that running requests have or will grow to fits the device tier.

    Order: decodes that have begun run in every step, and prefills fill the rest of it; on a target
    that does not mix them prefills have steps of their own, in which decodes rest. Requests are
    admitted by priority (larger first), then deadline, then so that those that share a prefix
    follow each other, then arrival. The nodes of the result stand in the order they run.
    """

    name: ClassVar[str] = "schedule"
    needs: ClassVar[tuple[str, ...]] = ("built", "placed")
    gives: ClassVar[str | None] = "scheduled"

    arrivals: bool = False
    """Honour arrival times, in virtual time. Otherwise all requests are there at once."""
    fill: bool = True
    """Cut a prefill where a step is full. Otherwise it waits for a step that has room for it."""

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        problem = flatten(graph)
        timeline = simulate(problem, self.arrivals, self.fill)
        ctx.count("steps", len(timeline.loops))
        ctx.count("forwards", sum(timeline.loops))
        ctx.count("cuts", sum(map(len, timeline.pieces.values())))
        return apply(problem, timeline)

    def trace(self, graph: IRGraph) -> tuple[RequestTrace, ...]:
        """Why each request of a built or placed graph runs when it does."""
        problem = flatten(graph)
        return explain(problem, simulate(problem, self.arrivals, self.fill))
