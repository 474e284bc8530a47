"""Bad input: one clear error, exit code 1, nothing on stdout and no half-written file."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm_ir.cli.run_engines import EngineChoice
from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.engines import find_backend
from tests.cli.conftest import EXAMPLES, Cli

TOKENS = "examples/tokens.jsonl"
FULL = Path("/dev/full")
HEAD = "sagellm_ir 1\n\ngraph @g {\n  request @r {prompt = 20, blocks = [0], max_new = 2}\n"
CYCLE = (
    HEAD
    + "  %a = prefill @r[0:16](%b) : kv<16>\n"
    + "  %b = prefill @r[16:20](%a) : kv<20>\n"
    + "  %d = decode @r[20:22](%b) : kv<22>\n}\n"
)
ILL_TYPED = (
    HEAD + "  %a = prefill @r[0:20] : kv<19>\n" + "  %d = decode @r[20:22](%a) : kv<22>\n}\n"
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("ir", "dump", "-r", TOKENS, "-p", "prefix-dedupe"), "did you mean 'prefix-dedup'?"),
        (("ir", "dump", "-r", TOKENS, "-p", "evict{policy=lur}"), "did you mean 'lru'?"),
        (("ir", "dump", "-r", TOKENS, "-p", "evict{polcy=lru}"), "did you mean 'policy'?"),
        (("ir", "dump", "-r", "nowhere.jsonl"), "nowhere.jsonl"),
        (("ir", "dump", "-r", TOKENS, "--target", "h20"), "did you mean 'h200'?"),
        (("ir", "dump", "-r", TOKENS, "--set", "max_tokens=0"), "max_tokens"),
        (("ir", "dump", "-r", TOKENS, "--set", "max_batch=-1"), "max_batch"),
        (("ir", "dump", "-r", TOKENS, "--set", "max_tokns=1"), "did you mean 'max_tokens'?"),
        (("ir", "dump", "-r", TOKENS, "--set", "max_tokens"), "expected KEY=VALUE"),
        (("ir", "dump", "-r", TOKENS, "--set", "name=["), "--set name=["),
        (("ir", "dump", "-r", TOKENS, "--set", "tp=1", "--set", "tp.a=2"), "each KEY once"),
        (("ir", "dump", "-r", TOKENS, "--target", "Makefile"), "end it with .yaml"),
        (("ir", "dump", "-r", TOKENS, "--target", "./examples/tokens.jsonl"), "is not YAML"),
        (("gateway", "status", "--gateway", "http://"), "expected http://HOST:PORT"),
        (("ir", "dump", "-r", TOKENS, "--set", "tiers.device.blocks=1"), "blocks"),
        (("ir", "verify", "nowhere.ir"), "cannot read nowhere.ir"),
        (("run", "--plan", "nowhere.json"), "nowhere.json"),
        (("run", "-r", TOKENS, "--model", "nowhere"), "nowhere"),
        (("explain", "t", "-r", TOKENS), "no request is called 't'"),
        (("backend", "test", "embeded"), "did you mean 'embedded'?"),
        (("ir", "repro", "nowhere.ir"), "nowhere.ir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_one_clear_error(words: tuple[str, ...], expected: str, cli: Cli) -> None:
    ran = cli(*words)
    assert ran.code == 1, ran.err
    assert ran.out == ""
    assert expected in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [(CYCLE, "cycle"), (ILL_TYPED, "kv<20>"), (HEAD, "end"), ("sagellm_ir 9\n", "9")],
    ids=["cyclic", "ill-typed", "cut off", "another version"],
)
def test_bad_graphs(text: str, expected: str, cli: Cli, tmp_path: Path) -> None:
    graph, output = tmp_path / "g.ir", tmp_path / "out.ir"
    graph.write_text(text)
    ran = cli("ir", "opt", "-O2", str(graph), "-o", str(output))
    assert ran.code == 1, ran.err
    assert expected in ran.err
    assert str(graph) in ran.err
    assert not output.exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "a", "prompt": "x"', "bad.jsonl:1"),
        ('{"id": "a", "prompt": 7}', "prompt"),
        ('{"id": "a", "prompt": "x", "max_tokens": 0}', "max_tokens"),
    ],
)
def test_bad_requests(line: str, expected: str, cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "good", "prompt": "hello"}\n'.replace("good", "g") + line + "\n")
    ran = cli("ir", "dump", "-r", str(bad), "--tokenizer", "bytes")
    assert ran.code == 1
    assert ran.out == ""
    assert expected.replace(":1", ":2") in ran.err
    skipped = cli("ir", "dump", "-r", str(bad), "--tokenizer", "bytes", "--skip-bad")
    assert skipped.code == 0
    assert "skipped 1 bad record" in skipped.err
    assert "request @g" in skipped.out


def plan_file(cli: Cli, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    assert cli("plan", "-r", TOKENS, "-o", str(path)).code == 0
    return path


def test_a_truncated_plan(cli: Cli, tmp_path: Path) -> None:
    path = plan_file(cli, tmp_path)
    path.write_text(path.read_text()[:-40])
    ran = cli("run", "--plan", str(path), "--backend", "simulator")
    assert (ran.code, ran.out) == (1, "")
    assert str(path) in ran.err


def test_a_plan_that_breaks_a_law(cli: Cli, tmp_path: Path) -> None:
    path = plan_file(cli, tmp_path)
    plan = json.loads(path.read_text())
    plan["steps"][0]["binds"] = []
    path.write_text(json.dumps(plan))
    ran = cli("run", "--plan", str(path), "--backend", "simulator")
    assert (ran.code, ran.out) == (1, "")
    assert "step 0" in ran.err


def test_a_plan_for_another_model(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    words = ("plan", "-r", TOKENS, "--set", "model.layers=3", "-o", str(path))
    assert cli(*words).code == 0
    ran = cli("run", "--plan", str(path))
    assert (ran.code, ran.out) == (1, "")
    assert "layers" in ran.err


def test_a_plan_for_another_target(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert cli("plan", "-r", TOKENS, "--target", "h200", "-o", str(path)).code == 0
    ran = cli("run", "--plan", str(path))
    assert (ran.code, ran.out) == (1, "")
    assert "is for target 'h200' with model 'qwen2.5-7b'" in ran.err
    assert "--target cpu" in ran.err


@pytest.mark.skipif(not find_backend("vllm").missing, reason="vLLM is here")
def test_a_plan_for_an_engine_that_is_not_installed(cli: Cli, tmp_path: Path) -> None:
    ran = cli("run", "--plan", str(plan_file(cli, tmp_path)), "--backend", "vllm")
    assert (ran.code, ran.out) == (1, "")
    assert "pip install 'sagellm-ir[vllm]'" in ran.err


def test_an_engine_of_16_bits_says_so(cli: Cli) -> None:
    ran = cli("run", "--prompt", "hi", "--backend", "lmdeploy", "--dtype", "float32")
    assert (ran.code, ran.out) == (1, "")
    assert "'lmdeploy' does not compute in 'float32'" in ran.err
    assert "--dtype bfloat16 or float16" in ran.err
    assert find_backend("lmdeploy").dtype(None) == "bfloat16"
    assert find_backend("embedded").dtype(None) == "float32"


@pytest.mark.parametrize("engine", ["embedded", "lmdeploy"])
def test_the_model_of_a_target_is_not_here(engine: str) -> None:
    choice = EngineChoice(engine, None, "bfloat16", "preset=auto")
    with pytest.raises(SageIRError, match=r"'qwen2.5-7b', is not here\n.*--model"):
        choice.load(load_target("h100").model)


@pytest.mark.parametrize(
    ("missing", "importer", "words"),
    [
        ("httpx", "sagellm_ir.runtime.control_plane.client", ("gateway", "status")),
        ("uvicorn", "sagellm_ir.runtime.control_plane.gateways", ("gateway", "start")),
    ],
)
def test_an_extra_that_is_not_installed(
    missing: str, importer: str, words: tuple[str, ...], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, _, name = importer.rpartition(".")
    monkeypatch.delitem(sys.modules, importer, raising=False)
    monkeypatch.delattr(importlib.import_module(package), name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    ran = cli(*words)
    assert (ran.code, ran.out) == (1, "")
    assert f"this needs {missing}" in ran.err
    assert "pip install 'sagellm-ir[" in ran.err


def test_a_model_folder_without_weights(cli: Cli, tmp_path: Path) -> None:
    ran = cli("run", "-r", TOKENS, "--model", str(tmp_path))
    assert (ran.code, ran.out) == (1, "")
    assert str(tmp_path) in ran.err


def test_an_output_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    ran = cli("plan", "-r", TOKENS, "-o", str(tmp_path / "no" / "plan.json"))
    assert ran.code == 1
    assert "cannot write" in ran.err


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_full_disk() -> None:
    command = [sys.executable, "-m", "sagellm_ir", "ir", "passes"]
    with FULL.open("wb") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 1
    assert ran.stderr == "cannot write the result: No space left on device\n"


def test_a_pipe_of_another_encoding_gets_utf_8() -> None:
    command = [sys.executable, "-m", "sagellm_ir", "plan", "-r", str(EXAMPLES / "tokens.jsonl")]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(command, capture_output=True, env=ascii_only)
    assert ran.returncode == 0, ran.stderr
    assert "█ prefill" in ran.stdout.decode()
