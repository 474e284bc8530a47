"""One plan on several engines: each reports what it ran, and the reports are compared."""

import json
from pathlib import Path

import pytest
from attrs import evolve

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.passes.pipeline import PRESETS
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime.backend import InferenceBackend
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, random_model
from sagellm_ir.runtime.engines.simulator import SimulatorEngine
from sagellm_ir.runtime.running import run_plan
from sagellm_ir.runtime.trace import (
    Trace,
    Traced,
    TraceRow,
    chunks,
    contents,
    differences,
    load_trace,
)
from sagellm_ir.target import DEVICE, HOST, Device, Target, Tier
from tests.embedded.tiny import BLOCK, TINY, prompt

MODEL = random_model(TINY, 3)
SPILLING = (
    "canonicalize,prefix-dedup,kv-reuse,chunk-prefill,schedule,evict{policy=lru, spill=always}"
)


def make_plan(pipeline: str) -> ExecutionPlan:
    """Questions about two documents, on a pool that does not hold them all."""
    requests = [
        Request(
            f"r{at}",
            prompt=TokenPrompt(prompt(5 * BLOCK, at % 2) + prompt(3 + at, 9 + at)),
            max_new_tokens=5,
            priority=at % 3,
        )
        for at in range(6)
    ]
    target = Target(
        block_size=BLOCK,
        max_tokens=16,
        max_batch=3,
        model=MODEL.spec,
        device=Device(step_overhead=1e-9),  # so that sharing pays for a model this small
        tiers=(Tier(DEVICE, 11), Tier(HOST, 64)),
    )
    return compile_requests(requests, target, pipeline).plan


def traced(engine: InferenceBackend, plan: ExecutionPlan) -> Trace:
    assert isinstance(engine, Traced)
    engine.trace = Trace(engine.capability.engine, plan.target.block_size)
    run_plan(engine, plan)
    return engine.trace


def embedded(plan: ExecutionPlan) -> Trace:
    return traced(EmbeddedEngine(MODEL, plan.target, stop_at_eos=False), plan)


@pytest.mark.parametrize("pipeline", [*PRESETS, SPILLING])
def test_the_simulator_and_the_embedded_engine_run_the_same(pipeline: str) -> None:
    plan = make_plan(pipeline)
    one, other = embedded(plan), traced(SimulatorEngine(plan.target), plan)
    assert differences(one, other) == []
    assert chunks(one) == [
        chunk
        for step in plan.steps
        for chunk in sorted((c.request, c.start, c.stop) for c in step.prefill)
    ]


def test_contents_follow_sharing_and_copies() -> None:
    plan = make_plan(SPILLING)
    trace = embedded(plan)
    assert any(forward.moves for forward in trace.forwards)
    shared = 0
    for row, held in contents(trace):
        known = [name for name in held if name is not None]
        # Each block holds what some request wrote as its block of the same number.
        assert [at for _, at in known] == list(range(len(held)))
        shared += any(writer != row.request for writer, _ in known)
    assert shared


def test_differences_are_seen() -> None:
    plan = make_plan("O2")
    trace = embedded(plan)
    swapped = evolve(trace, engine="swapped", forwards=trace.forwards[::-1])
    assert "chunk 0 differs" in differences(trace, swapped)[0]
    at, row = next(
        (at, row)
        for at, forward in enumerate(trace.forwards)
        for row in forward.rows
        if row.start >= BLOCK and not row.decode
    )
    wrong = evolve(row, blocks=(10 - row.blocks[0], *row.blocks[1:]))
    forward = trace.forwards[at]
    rows = tuple(wrong if other == row else other for other in forward.rows)
    forwards = [*trace.forwards]
    forwards[at] = evolve(forward, rows=rows)
    found = differences(trace, evolve(trace, engine="other", forwards=forwards))
    assert f"('{row.request}', {row.start}, {row.stop}) reads" in found[0]
    lost = evolve(trace, engine="lost", forwards=trace.forwards[:-1])
    assert "differ in number" in differences(trace, lost)[-1]


def test_files(tmp_path: Path) -> None:
    trace = embedded(make_plan(SPILLING))
    path = tmp_path / "trace.jsonl"
    trace.save(path)
    assert load_trace(path) == trace


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1: not a trace: it is empty"),
        ("{}", "1: not a trace: it has no header of version 1"),
        ("[", "1: not a trace: Expecting"),
        (
            '{"sagellm_trace": 1, "engine": "x", "block_size": 4}\n{"worker": "w0"}',
            "2: not a trace",
        ),
        ('{"sagellm_trace": 1, "engine": "x"}', "1: not a trace: 'block_size'"),
    ],
)
def test_files_that_are_no_traces(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(SageIRError, match=message):
        load_trace(path)
    with pytest.raises(SageIRError, match="No such file"):
        load_trace(tmp_path / "nothing.jsonl")


def test_a_line_is_a_forward(tmp_path: Path) -> None:
    trace = Trace("x", 4)
    trace.ran("w0", [TraceRow("r", 0, 3, False, (7,))])
    trace.save(tmp_path / "t")
    lines = (tmp_path / "t").read_text().splitlines()
    assert json.loads(lines[0]) == {"sagellm_trace": 1, "engine": "x", "block_size": 4}
    row = {"request": "r", "start": 0, "stop": 3, "decode": False, "blocks": [7]}
    assert json.loads(lines[1]) == {"worker": "w0", "moves": [], "rows": [row]}
