"""`backend test --all`: real engines agree, and an engine that does not is found out."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sagellm_ir.lowering.serial import load_plan
from sagellm_ir.runtime.agreement import HALF, absent, make_plan
from sagellm_ir.runtime.trace import chunks, load_trace
from tests.cli.conftest import Cli

VLLM = Path(__file__).parents[2] / "build" / "vllm" / "0.32.0" / "bin" / "python"
# Runs the embedded engine in place of the one it is asked for.
STAND_IN = """#!{python}
import json, subprocess, sys
from pathlib import Path
words = ["embedded" if word in ("vllm", "lmdeploy") else word for word in sys.argv[1:]]
subprocess.run([sys.executable, *words], check=True, stderr=subprocess.DEVNULL)
"""
SPOIL = """
answers, trace = Path(words[-1]), Path(words[-3])
data = json.loads(answers.read_text())
data["answers"][-1]["tokens"][-1] += 1
answers.write_text(json.dumps(data))
header, *forwards = trace.read_text().splitlines()
trace.write_text("\\n".join([header, *reversed(forwards)]))
"""


def stand_in(folder: Path, script: str) -> Path:
    """An interpreter that says it has another engine."""
    python = folder / "python"
    python.write_text(script.format(python=sys.executable))
    python.chmod(0o755)
    return python


def rows(out: str) -> dict[str, Any]:
    return {row["engine"]: row for row in json.loads(out)}


def test_run_writes_a_trace(cli: Cli, tmp_path: Path) -> None:
    plan, trace = tmp_path / "plan.json", tmp_path / "trace"
    cli("plan", "-r", "examples/tokens.jsonl", "-o", str(plan))
    assert (
        cli("run", "--plan", str(plan), "--backend", "simulator", "--trace", str(trace)).code == 0
    )
    found = load_trace(trace)
    assert len(chunks(found)) == sum(len(step.prefill) for step in load_plan(plan).steps)


def test_an_engine_that_differs_is_found_out(cli: Cli, tmp_path: Path) -> None:
    python = stand_in(tmp_path, STAND_IN + SPOIL)
    ran = cli("backend", "test", "--all", "--json", "--python", f"vllm={python}")
    assert ran.code == 1
    found = rows(ran.out)
    assert found["embedded"]["agrees"]
    assert found["simulator"]["agrees"]
    assert not found["vllm"]["agrees"]
    assert found["vllm"]["tokens"] is False
    assert "chunk 0 differs" in found["vllm"]["differences"][0]


def test_an_engine_of_16_bits(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the reference in its type; equal answers are counted, and chunks must agree."""
    monkeypatch.setitem(HALF, "lmdeploy", "bfloat16")  # CPUs are quicker at it
    python = stand_in(tmp_path, STAND_IN)
    ran = cli("backend", "test", "--all", "--json", "--python", f"lmdeploy={python}")
    found = rows(ran.out)["lmdeploy"]
    assert (found["dtype"], found["tokens"], found["agrees"]) == ("bfloat16", None, True)
    assert found["equal_answers"] == found["answers"] == 12
    assert ran.code == 0
    assert rows(ran.out)["embedded"]["dtype"] == "float32"


def test_plans_for_engines_that_do_not_mix() -> None:
    for mixed in (True, False):
        steps = make_plan("smollm2-135m", 3, mixed=mixed).steps
        assert any(step.prefill and step.decode for step in steps) == mixed


def test_engines_that_are_not_here_say_why(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert absent({})["lmdeploy"].startswith("pip install 'sagellm-ir[lmdeploy]', or --python")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert absent({}) == {"lmdeploy": "it needs a CUDA device, and there is none"}
    assert absent({"lmdeploy": "python"}) == {}


def test_interpreters_that_are_not_there(cli: Cli) -> None:
    ran = cli("backend", "test", "--all", "--python", "vllm=/no/such/python")
    assert ran.code == 1
    assert "no interpreter '/no/such/python' for engine 'vllm'" in ran.err


def test_interpreters_of_unknown_engines(cli: Cli) -> None:
    assert "did you mean 'vllm'" in cli("backend", "test", "--all", "--python", "vlm=x").err
    assert cli("backend", "test", "--all", "--python", "vllm").code == 2


@pytest.mark.skipif(not VLLM.exists(), reason="no vLLM: 'make build/vllm/.ready' brings it")
def test_all_engines_agree(cli: Cli) -> None:
    ran = cli("backend", "test", "--all", "--json", "--python", f"vllm={VLLM}")
    found = rows(ran.out)
    assert found.keys() >= {"embedded", "simulator", "vllm"}
    assert all(row["agrees"] for row in found.values()), ran.out
    assert found["vllm"]["tokens"] is True
    assert found["vllm"]["moved_blocks"] > 0
    assert found["vllm"]["chunks"] >= 12
