"""Plans as JSON: the round trip, what is refused and how, and the schema."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from attrs import evolve, frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.plan import Collective, KVMove, LiveBlock, Resident
from sagellm_ir.lowering.schema import plan_schema, schema_of
from sagellm_ir.lowering.serial import load_plan, plan_from_json, plan_to_json, save_plan
from tests.lowering.plans import graphs
from tests.lowering.test_verify_plan import PLAN

FULL = evolve(
    PLAN,
    resident=(Resident("host", (3, 4), (0, 1), "w0"),),
    live=(LiveBlock("r0", 9, 6),),
    retained=(Resident("host", (3,), (0,)),),
    requests=(evolve(PLAN.requests[0], tokens=tuple(range(10)), deadline=1.5), PLAN.requests[1]),
    steps=(
        evolve(
            PLAN.steps[0],
            kv=(KVMove("host", "device", (0,), (1,), "w0", "x"),),
            collectives=(Collective("tp", 64, 60, "residual-norm"),),
        ),
        *PLAN.steps[1:],
    ),
)
"""A plan with everything in it (not a legal one)."""


@given(graphs())
@settings(deadline=None)
def test_every_plan_comes_back(graph: IRGraph) -> None:
    plan = lower(graph)
    text = plan_to_json(plan)
    assert plan_from_json(text) == plan
    assert plan_to_json(plan_from_json(text)) == text


def test_every_member_comes_back() -> None:
    text = plan_to_json(FULL)
    assert plan_from_json(text) == FULL
    jsonschema.validate(json.loads(text), plan_schema())


def test_one_step_a_line() -> None:
    lines = plan_to_json(PLAN).splitlines()
    assert lines[1] == '"version": 1,'
    assert sum(line.startswith('{"index": ') for line in lines) == len(PLAN.steps)


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_plan(PLAN, path)
    assert load_plan(path) == PLAN
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SageIRError, match="cannot write"):
        save_plan(PLAN, tmp_path / "none" / "a.json")
    with pytest.raises(SageIRError, match="cannot read the plan"):
        load_plan(tmp_path / "b.json")


def changed(change: Any) -> str:
    data = json.loads(plan_to_json(PLAN))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p.json:1:1: error: not JSON: Expecting value"),
        (plan_to_json(PLAN)[:300], r"p.json:\d+:\d+: error: not JSON"),
        ("[1]", "a plan is a JSON object"),
        ("{}", "begins with its version"),
        ('{"version": 2}', "version 2, and this release reads 1"),
        ('{"version": NaN}', "NaN is no JSON number"),
        ("[" * 100_000, "cannot be read"),
        ('{"version": ' + "9" * 10_000 + "}", "cannot be read"),
        (changed(lambda d: d.update(stepz=[])), "unknown member 'stepz': did you mean 'steps'"),
        (changed(lambda d: d.pop("target")), r"member 'target' is missing @ \$"),
        (
            changed(lambda d: d["steps"][0].update(loops="1")),
            r"expected int, got '1' @ \$.steps\[0\].loops",
        ),
        (changed(lambda d: d["steps"][0].update(loops=True)), "expected int, got True"),
        (changed(lambda d: d["steps"][0].update(cost=None)), "expected a finite number, got None"),
        (changed(lambda d: d["steps"][0].update(cost=1e999)), "expected a finite number|Infinity"),
        (
            changed(lambda d: d["steps"][4]["kv"][0].update(op="fre")),
            r"no KV action 'fre': did you mean 'free'\? @ \$.steps\[4\].kv\[0\]",
        ),
        (changed(lambda d: d["target"].update(block_size=0)), r"block_size.* must be > 0"),
        (changed(lambda d: d.update(steps=3)), r"\$.steps"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(SageIRError, match=message):
        plan_from_json(text, "p.json")


@given(st.data())
@settings(deadline=None)
def test_damage_is_an_error_or_harmless(data: st.DataObject) -> None:
    text = plan_to_json(PLAN)
    at = data.draw(st.integers(0, len(text) - 1))
    broken = text[:at] + data.draw(st.sampled_from(["", "}", '"', "0", "\\", "é"])) + text[at + 1 :]
    try:
        plan = plan_from_json(broken)
    except SageIRError:
        return
    assert plan_from_json(plan_to_json(plan)) == plan


def test_the_schema_is_one_and_refuses_what_the_reader_refuses() -> None:
    schema = plan_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    data = json.loads(plan_to_json(PLAN))
    jsonschema.validate(data, schema)
    changes: tuple[dict[str, Any], ...] = (
        {"version": 2},
        {"stepz": []},
        {"steps": [{}]},
        {"steps": [{"index": "0"}]},
        {"steps": [{"index": 0, "kv": [{"op": "melt"}]}]},
    )
    for change in changes:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**data, **change}, schema)


def test_the_schema_says_what_docstrings_say() -> None:
    schema = plan_schema()
    step = schema["$defs"]["PlanStep"]
    assert step["description"].startswith("One decision of the engine.")
    assert step["properties"]["cost"]["description"] == "Predicted seconds."
    assert schema["$defs"]["PlanRequest"]["properties"]["priority"]["description"]


def test_a_type_json_cannot_show_is_refused() -> None:
    @frozen
    class Odd:
        table: dict[str, int]

    with pytest.raises(TypeError, match="no JSON Schema for"):
        schema_of(Odd)
