"""`explain_request` tells of the plan: its steps and its clock."""

import pytest

from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.explain import explain_request
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.presets import load_target
from sagellm_ir.request import Request, TokenPrompt

RECOMPUTES = "canonicalize,prefix-dedup,schedule,evict{spill=never}"


@pytest.mark.parametrize(("pipeline", "blocks"), [("O2", 1000), (RECOMPUTES, 44)])
def test_steps_and_times_are_those_of_the_plan(pipeline: str, blocks: int) -> None:
    """Two documents by turns. With few blocks `evict` puts steps in: those of `schedule` shift."""
    requests = [
        Request(
            f"r{i}",
            prompt=TokenPrompt((*range(i % 2 * 1000, i % 2 * 1000 + 400), *range(i, i + 30))),
            max_new_tokens=10 + i,
            priority=-i,
        )
        for i in range(6)
    ]
    target = load_target("cpu", tiers={"device": {"blocks": blocks}}, max_tokens=96, max_batch=2)
    made = compile_requests(requests, target, pipeline)
    costs = [step.cost for step in made.plan.steps]
    for request in requests:
        found = explain_request(made.built, Pipeline.parse(pipeline), request.id)
        mine = [
            step.index
            for step in made.plan.steps
            if request.id in (*step.decode, *(chunk.request for chunk in step.prefill))
        ]
        assert (found.first, found.last) == (mine[0], mine[-1])
        assert found.start == pytest.approx(sum(costs[: mine[0]]))
        assert found.end == pytest.approx(sum(costs[: mine[-1] + 1]))
