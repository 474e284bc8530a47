"""`llm` and `gateway` as a user runs them: processes, signals, files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from sagellm_ir.cli.main import main
from sagellm_ir.runtime.config import FILE_VARIABLE, load_config
from sagellm_ir.runtime.control_plane.packages import have
from sagellm_ir.runtime.control_plane.processes import EngineProcess, Engines
from tests.control_plane.tiny_fleet import LETTERS, TEMPLATE, tiny_tokenizer

transformers = pytest.importorskip("transformers")

COMMAND = (sys.executable, "-m", "sagellm_ir")
QUESTION = "Once upon a time"
NEW = 1200
"""Tokens of an answer: it must still run when a busy machine has looked where it does."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(LETTERS),
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder; whatever engines are left in it are ended."""
    monkeypatch.setenv("SAGELLM_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("SAGELLM_CONTROL_PLANE__HEARTBEAT", "0.2")
    yield tmp_path
    for process in Engines(tmp_path).running():
        Engines(tmp_path).stop(process.engine_id, 0.0, kill=True)


def run(*words: str, code: int = 0) -> str:
    """A command's output; of one that fails, what it says."""
    done = subprocess.run((*COMMAND, *words), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


@contextlib.contextmanager
def gateway(*words: str) -> Iterator[str]:
    """A gateway process on a free port, and its URL."""
    process = subprocess.Popen(
        (*COMMAND, "gateway", "start", "--port", "0", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("gateway ("), line
    try:
        yield line.split()[-1].removesuffix("/v1")
    finally:
        process.terminate()
        assert process.wait(30) == 0


def streamed(url: str, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of an answer's text."""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text


def test_a_killed_engine_process_loses_no_text(model: Path, state: Path) -> None:
    with gateway("--kind", "own") as url:
        start = ("llm", "engine", "start", str(model), "--engine-kind", "sagellm")
        options = ("--pipeline", "O2", "--gateway", url, "--json")
        first, second = (json.loads(run(*start, *options)) for _ in range(2))
        assert [first["engine_id"], second["engine_id"]] == ["sagellm-0", "sagellm-1"]
        listed = json.loads(run("llm", "engine", "list", "--json"))
        assert [engine["state"] for engine in listed] == ["READY", "READY"]
        behind = json.loads(run("gateway", "status", "--gateway", url, "--json"))
        assert behind["models"] == [httpx.get(f"{url}/v1/models").json()["data"][0]["id"]]
        assert {engine["engine_id"] for engine in behind["engines"]} == {"sagellm-0", "sagellm-1"}

        body = {
            "model": behind["models"][0],
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": NEW,
            "temperature": 0,
            "stream": True,
        }
        whole = "".join(streamed(second["url"], body))
        assert len(whole) == NEW
        if have("sagellm_gateway"):
            ask_the_sage_gateway(second["url"], body, whole)
        pieces = streamed(url, body)
        text = next(pieces)
        runs = {e["pid"]: httpx.get(f"{e['url']}/info").json()["load"]["running"] for e in listed}
        [busy] = [pid for pid, count in runs.items() if count]
        os.kill(busy, signal.SIGKILL)
        assert text + "".join(pieces) == whole

        [left] = json.loads(run("llm", "engine", "list", "--json"))
        assert left["pid"] != busy
        shown = json.loads(run("llm", "engine", "status", left["engine_id"], "--json"))
        assert shown["state"] == "READY"
        assert shown["info"]["load"]["finished"] >= 1
        assert json.loads(run("llm", "engine", "stop", "--all", "--json")) == {
            left["engine_id"]: True
        }
        behind = json.loads(run("gateway", "status", "--gateway", url, "--json"))
        assert left["engine_id"] not in {engine["engine_id"] for engine in behind["engines"]}


def ask_the_sage_gateway(engine: str, body: dict[str, Any], whole: str) -> None:
    """SAGE's own gateway package, started by our command; an engine is attached by its URL."""
    with gateway("--kind", "sage", "--policy", "slo_aware") as url:
        words = ("llm", "engine", "attach", engine, "--engine-kind", "lmdeploy", "--gateway", url)
        attached = json.loads(run(*words, "--json"))
        until = time.monotonic() + 30
        states = f"{url}/v1/management/engines"
        while httpx.get(states).json()["healthy"] == 0:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert attached["engine_id"].startswith("lmdeploy-")
        assert "".join(streamed(url, body)) == whole


def test_a_served_engine_takes_its_time_to_finish(model: Path, state: Path) -> None:
    options = ("--engine-id", "mine", "--alone", "--kv-schema", "preset=int8", "--json")
    process = json.loads(run("llm", "engine", "start", str(model), *options))
    taken = run("llm", "engine", "start", str(model), "--engine-id", "mine", "--alone", code=1)
    assert "an engine 'mine' runs already" in taken
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": NEW,
        "stream": True,
    }
    pieces = streamed(process["url"], body)
    text = [next(pieces)]
    stopping = threading.Thread(target=run, args=("llm", "engine", "stop", "mine"))
    stopping.start()
    text += list(pieces)
    stopping.join()
    assert len("".join(text)) == NEW
    assert run("llm", "engine", "list", "--json").strip() == "[]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("llm", "engine", "start", "m", "--engine-kind", "vllm"), "--backend vllm"),
        (("llm", "engine", "start", "m", "--engine-kind", "sagelm"), "did you mean 'sagellm'?"),
        (("llm", "engine", "start", "m", "--backend", "embeded"), "did you mean 'embedded'?"),
        (("llm", "engine", "start", "m", "--kv-schema", "preset=fp9"), "fp9"),
        (("llm", "engine", "start", "m", "--engine-id", "../x"), "expected letters"),
        (("llm", "engine", "start", "m", "--instance-type", "prefil"), "prefil"),
        (("llm", "serve", "no-such-model"), "no-such-model"),
        (("llm", "engine", "stop", "nobody"), "no engine 'nobody' runs here"),
        (("llm", "engine", "status", "nobody"), "no engine 'nobody' runs here"),
        (("llm", "engine", "attach", "nowhere"), "expected http://HOST:PORT"),
        (("llm", "engine", "list", "--gateway", "http://127.0.0.1:9"), "no gateway answers"),
        (("gateway", "status", "--gateway", "http://127.0.0.1:9"), "gateway start"),
        (("gateway", "start", "--prefer", "ascnd"), "did you mean 'ascend'?"),
        (("gateway", "start", "--routing", "longest"), "did you mean 'longest_prefix'?"),
        (("gateway", "start", "--kind", "own", "--policy", "fifo"), "--policy is SAGE's"),
    ],
)
def test_wrong_words_are_told(
    words: tuple[str, ...], said: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_wrong_usage_is_told(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("gateway", "start", "--kind", "sag")) == 2
    assert "no 'sag'" in capsys.readouterr().err
    assert main(("llm", "engine", "stop")) == 2
    assert "--all" in capsys.readouterr().err


def test_an_engine_that_cannot_start_says_why(state: Path) -> None:
    assert "no-such-model" in run("llm", "engine", "start", "no-such-model", "--alone", code=1)


def test_a_file_that_a_crash_left_behind_is_no_engine(state: Path) -> None:
    engines = Engines(state)
    with engines.claim("a"):
        engines.write(EngineProcess("a", os.getpid(), "embedded", "m"))
        assert [process.engine_id for process in engines.running()] == ["a"]
        path = state / "engines" / "a.json"
        left = path.read_text()
    path.write_text(left)  # as if the process had been killed
    assert engines.running() == []
    assert not path.exists()
    path.write_text("{")
    with engines.claim("a"):
        assert engines.running() == []


@pytest.mark.parametrize(
    "words", [("llm", "engine", "start", "m", "--foreground", "--alone"), ("llm", "serve", "m")]
)
def test_what_an_engine_reads_of_a_configuration_by_itself(
    words: tuple[str, ...], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loader and its workers ask for the configuration again: it is that of `--config`."""
    file = state / "mine.yaml"
    file.write_text("accel: {mode: off}\n")
    monkeypatch.setenv(FILE_VARIABLE, "")  # as it was, afterwards
    seen: list[Any] = []
    monkeypatch.setattr(
        "sagellm_ir.runtime.control_plane.serving.serve_engine",
        lambda config, **_: seen.append((config.accel.mode, load_config().accel.mode)),
    )
    assert main([*words, "--config", str(file)]) == 0
    assert seen == [("off", "off")]
