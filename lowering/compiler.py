"""`compile_requests`: requests -> a plan, in one call."""

from collections.abc import Mapping, Sequence

from attrs import frozen

from sagellm_ir.build import Tokenizer, build
from sagellm_ir.collecting import no_collections
from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering.lower import lower
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.nodes import Location
from sagellm_ir.passes.instruments import Instrument
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.request import Request
from sagellm_ir.target import Target

__all__ = ["Compiled", "compile_requests"]


@frozen
class Compiled:
    """A plan, and the graphs it came from."""

    built: IRGraph
    scheduled: IRGraph
    plan: ExecutionPlan


@no_collections()
def compile_requests(
    requests: Sequence[Request],
    target: Target,
    pipeline: Pipeline | str = "O2",
    *,
    name: str = "main",
    tokenizer: Tokenizer | None = None,
    locations: Mapping[str, Location] | None = None,
    instruments: Sequence[Instrument] = (),
) -> Compiled:
    """Builds the graph of `requests`, runs passes over it and lowers it.

    Args:
        requests: what to serve.
        target: what to compile for.
        pipeline: passes, as `Pipeline` or text.
        name: of graph and plan.
        tokenizer: needed when a prompt is text or chat.
        locations: where each request was written, by id.
        instruments: watch the passes.

    Raises:
        SageIRError: a request, the pipeline or the target is wrong, or they do not fit together.
    """
    passes = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline
    built = build(requests, target, name=name, tokenizer=tokenizer, locations=locations or {})
    sampling = {request.id: request.sampling for request in requests}
    scheduled = PassManager(passes, instruments).run(built.graph)
    return Compiled(built.graph, scheduled, lower(scheduled, built.tokens, sampling))
