"""A server process that gets SIGTERM: what runs finishes, what comes is sent away, it exits with 0."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


@contextmanager
def answering(process: Process, tokens: int) -> Iterator[Iterator[str]]:
    """The events of an answer that is being made: its first token has come."""
    body = {"prompt": "x", "max_tokens": tokens, "stream": True}
    with httpx.stream("POST", f"{process.url}/v1/completions", json=body, timeout=60) as reply:
        events = (line for line in reply.iter_lines() if line)
        assert "text" in next(events)
        yield events


def test_running_requests_finish_and_new_ones_are_sent_away(process: Process) -> None:
    with answering(process, 1000) as events:
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
        *_, closing, done = events
    assert (json.loads(closing[6:])["choices"][0]["finish_reason"], done) == (
        "length",
        "data: [DONE]",
    )
    assert process.rest() == "ended\n"
    assert process.process.returncode == 0


@pytest.mark.parametrize("process", [0.1], indirect=True)
def test_draining_ends_after_its_time_and_says_so(process: Process) -> None:
    """The clients hear why their answers end, however slow the machine is."""
    heard = list[str]()
    with ThreadPoolExecutor(1) as pool, answering(process, 1000) as events:
        body = {"prompt": "x", "max_tokens": 1000}
        whole = pool.submit(httpx.post, f"{process.url}/v1/completions", json=body, timeout=60)
        while httpx.get(f"{process.url}/info").json()["load"]["running"] < 2:
            assert not whole.done(), whole.result().text
        process.terminate()
        with pytest.raises(httpx.RemoteProtocolError):  # a stream that cannot go on has no end
            heard.extend(events)
    rest = process.rest()
    assert "2 requests unfinished" in rest
    assert rest.endswith("ended\n")
    assert "Traceback" not in rest
    assert process.process.returncode == 0
    assert json.loads(heard[-1][6:])["error"]["code"] == "engine_draining"
    assert whole.result().status_code == 503
    assert whole.result().json()["error"]["code"] == "engine_draining"
