"""A server process that gets SIGTERM: what runs finishes, what comes is sent away, it exits with 0."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
SERVER = """
import contextlib, torch
from sagellm_ir.runtime import SageLLMEngine
from sagellm_ir.runtime.config import LimitsConfig, ServerConfig
from sagellm_ir.runtime.server.main import serve
from tests.server.tiny import load_tiny

torch.set_num_threads(1)

@contextlib.asynccontextmanager
async def joining(host, port):
    print("joined", flush=True)
    yield
    print("left", flush=True)

serve(
    SageLLMEngine(load_tiny(512)),
    ServerConfig(port=0),
    LimitsConfig(drain_seconds=SECONDS),
    joining=joining,
    started=lambda host, port: print(f"http://{host}:{port}", flush=True),
)
print("ended", flush=True)
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, seconds: float) -> None:
        code = SERVER.replace("SECONDS", str(seconds))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.line() == "joined"
        self.url = self.line()
        assert re.fullmatch(r"http://127.0.0.1:\d+", self.url)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def rest(self) -> str:
        return self.process.communicate(timeout=30)[0]


@pytest.fixture(params=[30.0])
def process(request: pytest.FixtureRequest) -> Iterator[Process]:
    found = Process(request.param)
    yield found
    if found.process.poll() is None:
        found.process.kill()
        found.process.wait()


def begin(process: Process, tokens: int) -> tuple[threading.Thread, list[httpx.Response]]:
    """Ask for an answer, and return once it is being made."""
    answers: list[httpx.Response] = []

    def post() -> None:
        body = {"prompt": "x", "max_tokens": tokens}
        try:
            answers.append(httpx.post(f"{process.url}/v1/completions", json=body, timeout=60))
        except httpx.HTTPError:
            return

    thread = threading.Thread(target=post)
    thread.start()
    while not httpx.get(f"{process.url}/info").json()["load"]["running"]:
        assert not answers, answers[0].text
        time.sleep(0.005)
    return thread, answers


def test_running_requests_finish_and_new_ones_are_sent_away(process: Process) -> None:
    thread, answers = begin(process, 1000)
    process.terminate()
    assert process.line() == "left"
    with httpx.Client(base_url=process.url) as http:
        ready = http.get("/ready")
        assert ready.status_code == 503
        assert ready.headers["Retry-After"]
        late = http.post("/v1/completions", json={"prompt": "late"})
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "engine_draining"
        assert http.get("/health").status_code == 200
    thread.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 1000
    assert process.rest() == "ended\n"
    assert process.process.returncode == 0


@pytest.mark.parametrize("process", [0.1], indirect=True)
def test_draining_ends_after_its_time(process: Process) -> None:
    thread, answers = begin(process, 1000)
    process.terminate()
    rest = process.rest()
    thread.join()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "engine_draining"
    assert "1 requests unfinished" in rest
    assert rest.endswith("ended\n")
    assert "Traceback" not in rest
    assert process.process.returncode == 0
