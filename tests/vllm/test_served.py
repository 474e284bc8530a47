"""`llm engine start --backend vllm`: a real process, registered at a gateway, that answers through it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sagellm_ir.runtime.engines.vllm.versions import TESTED_VERSIONS, check_version

MODEL = "smollm2-135m"
OURS = (sys.executable, "-m", "sagellm_ir")
pytestmark = pytest.mark.skipif(
    check_version() != TESTED_VERSIONS[-1], reason="half a minute: with the newest release only"
)


def sagellm(*words: str) -> Any:
    """A command of ours, and its JSON."""
    done = subprocess.run((*OURS, *words, "--json"), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its URL."""
    monkeypatch.setenv("SAGELLM_STATE_DIR", str(tmp_path))
    command = (*OURS, "gateway", "start", "--port", "0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1].removesuffix("/v1")
        finally:
            sagellm("llm", "engine", "stop", "--all")
            process.terminate()


def test_it_answers_through_a_gateway(gateway: str) -> None:
    words = ("llm", "engine", "start", MODEL, "--backend", "vllm", "--gateway", gateway)
    started = sagellm(*words)
    assert started["backend"] == "vllm"
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": MODEL, "messages": [question], "max_tokens": 16, "temperature": 0}
    answer = httpx.post(f"{gateway}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert httpx.get(f"{started['url']}/info").json()["load"]["finished"] == 1
