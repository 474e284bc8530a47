"""Tokens take room in forwards: what a small model computes in no time still costs a forward."""

import numpy as np
import pytest
from attrs import evolve

from sagellm_ir.cost import CostModel
from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.presets import load_target
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.target import Device, Target


def target(max_tokens: int) -> Target:
    """A device that is much faster than its launches."""
    return evolve(
        load_target("h200", block_size=32, max_batch=8),
        max_tokens=max_tokens,
        device=Device(flops=1e18, bandwidth=1e16, step_overhead=1e-3),
    )


@pytest.mark.parametrize(("max_tokens", "shared"), [(512, True), (8192, False)])
def test_a_prefix_is_shared_where_computing_it_again_takes_a_forward(
    max_tokens: int, shared: bool
) -> None:
    document = tuple(range(640))
    requests = [
        Request(f"r{at}", prompt=TokenPrompt((*document, 1000 + at)), max_new_tokens=4)
        for at in range(3)
    ]
    plan = compile_requests(requests, target(max_tokens), "O2").plan
    computed = sum(chunk.stop - chunk.start for step in plan.steps for chunk in step.prefill)
    assert computed == (640 + 3 if shared else 3 * 641)


def test_tokens_that_are_not_computed_save_their_part_of_forwards() -> None:
    cost = CostModel(target(500))
    assert cost.saved(0, 500) == pytest.approx(cost.prefill(0, 500) + 1e-3)
    starts, stops = np.array([0, 100]), np.array([50, 200])
    each = [cost.saved(0, 50), cost.saved(100, 200)]
    assert cost.saved(starts, stops).tolist() == pytest.approx(each)
