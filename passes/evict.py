"""`evict`: makes a schedule fit the tiers."""

from typing import ClassVar

from attrs import Attribute, field, frozen, validators

from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.eviction.emit import emit
from sagellm_ir.passes.eviction.live import fits, flatten
from sagellm_ir.passes.eviction.steps import StepFacts
from sagellm_ir.passes.eviction.sweep import Sweep
from sagellm_ir.passes.kv_policy import policy_names

__all__ = ["Evict"]


def _is_policy(_: object, option: "Attribute[str]", value: str) -> None:
    if value not in (names := policy_names()):
        raise ValueError(f"{option.name!r} must be one of {names}", option, names, value)


@frozen
class Evict(Pass):
    """Makes live KV fit every tier in every step: register allocation over the schedule.

    Law: requests get the same tokens; only KV that nothing running needs leaves the device, and it
    is back when something does. What leaves is copied to a lower tier and fetched (`%x.spill`,
    `%x.back`), or dropped and computed again (`%x.again`), whichever the cost model finds cheaper.
    The end of a prompt and answers are never dropped. When a step has no room to compute what it
    needs again, a step is put in before it, in which decodes rest.

    The graph comes back as it is when it fits. After `schedule` with the same target there is
    a way unless values that cannot be dropped find no room in any tier.
    """

    name: ClassVar[str] = "evict"
    needs: ClassVar[tuple[str, ...]] = ("scheduled",)

    policy: str = field(default="belady", validator=_is_policy)
    """Who leaves first: `belady`, `lru`, `lfu`, `fifo`, `cost`, or one that a package brings."""
    spill: str = field(default="auto", validator=validators.in_(("auto", "always", "never")))
    """Copy what leaves to a lower tier: when that is cheaper, whenever there is room, or only
    what cannot be computed again."""

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        if fits(graph):
            return graph
        live = flatten(graph)
        steps = StepFacts(graph)
        sweep = Sweep(live, steps, self.policy, self.spill)
        sweep.run()
        if not sweep.batches:
            return graph
        gone = [away for batch in sweep.batches for _, away in batch.values]
        ctx.count("spills", sum(away.since >= 0 for away in gone))
        ctx.count("drops", sum(away.store < 0 for away in gone))
        result = emit(live, steps, sweep.batches)
        ctx.count("steps put in", len(result.loops) - len(graph.loops))
        return result
