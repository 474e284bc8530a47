"""A mixed fleet with a real vLLM: its own server as it ships, with no code of ours in it, beside two
engines of ours behind the real `ControlPlaneManager`. Most of the time goes to vLLM's start.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from attrs import frozen

from sagellm_ir.presets import load_target
from sagellm_ir.request import Request, TextPrompt
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, load_model
from sagellm_ir.runtime.engines.embedded.export import export_folder
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from sagellm_ir.runtime.engines.vllm.versions import TESTED_VERSIONS
from tests.control_plane.mixed import HERE, Mixed, mixed_fleet, only_these_are_out, streamed

RELEASE = TESTED_VERSIONS[-1]
BUILD = Path(__file__).parents[2] / "build" / "vllm"
PYTHON = BUILD / RELEASE / "bin" / "python"
pytestmark = [
    pytest.mark.usefixtures("real_control_plane"),
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"there is no {PYTHON}: make build/vllm/.ready brings vLLM"
    ),
]
MODEL = "smollm2-135m"
NEW = 16
# fmt: off
OPTIONS = (
    "--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "1024",
    "--max-num-seqs", "8", "--enforce-eager", "--enable-prefix-caching", "--block-size", "32",
    "--distributed-executor-backend", "uni",
)
# fmt: on
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
}
DOCUMENTS = (
    "The lighthouse of Port Ellen was built by two brothers in 1821. It is forty metres high, "
    "painted white and red, and its lamp is still lit by hand on the first night of every winter.",
    "The market of Tarn opens before the sun rises. Farmers sell apples, honey and cheese, and "
    "an old man with a violin plays the same three songs until the church bell rings at noon.",
    "The night train to Lyon has nine cars and one dining room. It leaves at ten, crosses two "
    "rivers and a long tunnel, and the conductor wakes every passenger with a cup of coffee.",
)
# The answers to the first have no two tokens that would be one where an answer is cut between them:
# over HTTP an answer goes on from its text.
QUESTIONS = ("One day I went there, and", "In short, it is")


def prompt(document: int, question: int) -> str:
    return f"{DOCUMENTS[document]} {QUESTIONS[question]}"


@frozen
class RealVLLM:
    """A server process of vLLM."""

    process: "subprocess.Popen[bytes]"
    port: int

    def kill(self) -> None:
        """All of it, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def counted(self, name: str) -> float:
        """One of its own counters, summed."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        found = re.findall(rf"^vllm:{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE)
        assert found, text
        return sum(map(float, found))


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[RealVLLM]:
    """It serves SmolLM2."""
    folder = export_folder(MODEL, tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    kept = {"VLLM_CACHE_ROOT": str(BUILD / f"cache-{RELEASE}")}  # that of tests/vllm
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *OPTIONS],
            stdout=out,
            stderr=out,
            env={**os.environ, **ENVIRONMENT, **kept},
            start_new_session=True,
        )
    server = RealVLLM(process, port)
    try:
        until = time.monotonic() + 300
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield server
    finally:
        server.kill()
        process.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2.0).is_success
    return False


@pytest.fixture
def make() -> Callable[[str], SageLLMEngine]:
    """An embedded engine of the same model, by its id."""
    model = load_model(MODEL)
    target = load_target("cpu", tiers={"device": {"blocks": 256}})

    def made(name: str) -> SageLLMEngine:
        loaded = LoadedBackend(EmbeddedEngine(model, target), target, model.tokenizer, MODEL)
        return SageLLMEngine(loaded, engine_id=name)

    return made


async def right_answers(engine: SageLLMEngine, question: int) -> list[tuple[str, str]]:
    """What one engine of ours says about each document, alone."""
    found: list[tuple[str, str]] = []
    for document in range(len(DOCUMENTS)):
        text = prompt(document, question)
        asked = Request(str(document), prompt=TextPrompt(text), max_new_tokens=NEW)
        whole = await engine.execute(asked)
        found.append((whole.text, whole.finish))
    return found


async def asked(mixed: Mixed, question: int) -> list[tuple[str, str]]:
    """One question about each document, all at once."""
    return await asyncio.gather(
        *(
            streamed(mixed.manager, f"{question}.{n}", prompt(n, question), MODEL, NEW)
            for n in range(len(DOCUMENTS))
        )
    )


def test_it_answers_and_dies_and_no_request_is_lost(
    vllm: RealVLLM, make: Callable[[str], SageLLMEngine]
) -> None:
    async def run() -> None:
        alone = make("alone")
        alone.start()
        right = [await right_answers(alone, question) for question in range(len(QUESTIONS))]
        alone.stop()
        async with mixed_fleet(make=make, elsewhere={"vllm": vllm.port}, model=MODEL) as mixed:
            for question in range(len(QUESTIONS)):
                assert await asked(mixed, question) == right[question]
            # One document each: that of vLLM was in its own prefix cache the second time.
            assert vllm.counted("request_success") == 2
            assert vllm.counted("prefix_cache_hits") >= 32
            assert [mixed.engines[name].load().finished for name in HERE] == [2, 2]

            # Its connections end after these tokens, however fast it is; then so does the process.
            cable = mixed.cables["vllm"]
            cable.after = 6
            running = asyncio.create_task(asked(mixed, 0))
            await asyncio.wait_for(cable.lost.wait(), 60)
            vllm.kill()
            assert await running == right[0]
            assert sum(mixed.engines[name].load().finished for name in HERE) == 7
            await only_these_are_out(mixed, ("vllm",))

    asyncio.run(run())
