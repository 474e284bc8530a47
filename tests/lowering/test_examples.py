"""The plans of the example files, as they stand: a change of any shows in the diff."""

from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

from sagellm_ir.build import ByteTokenizer
from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.render import plan_text
from sagellm_ir.lowering.serial import plan_from_json, plan_to_json
from sagellm_ir.lowering.verify_plan import verify_plan
from sagellm_ir.requests import load_requests
from sagellm_ir.runtime.engines.simulator import SimulatorEngine
from sagellm_ir.target import Target

PIPELINE = "O2"
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.jsonl"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_plan_of_an_example(path: Path, snapshot: SnapshotAssertion) -> None:
    loaded = load_requests([path])
    compiled = compile_requests(
        loaded.requests, Target(), PIPELINE, name=path.stem, tokenizer=ByteTokenizer()
    )
    verify_plan(compiled.plan)
    assert plan_from_json(plan_to_json(compiled.plan)) == compiled.plan
    report = SimulatorEngine(Target()).execute(compiled.plan)
    assert all(request.finish is not None for request in report.requests)
    assert plan_text(compiled.plan) == snapshot
