"""Server processes of `serve.py`: started, watched, and ended by signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from attrs import frozen

__all__ = ["Process", "Usage", "ours", "started", "vllm"]

# vLLM on a CPU: threads unbound, as ours are; GiB of KV; no network.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

_TICK = os.sysconf("SC_CLK_TCK")


@frozen
class Usage:
    """What a process and its children have taken."""

    cpu_seconds: float
    rss_mib: float
    threads: int
    files: int


@frozen
class Process:
    """A server that listens."""

    name: str
    url: str
    model: str
    pid: int

    def usage(self) -> Usage:
        """As Linux counts it."""
        cpu = rss = 0.0
        threads = files = 0
        for pid in _family(self.pid):
            try:
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                files += len(os.listdir(f"/proc/{pid}/fd"))
            except OSError:
                continue
            cpu += (int(stat[11]) + int(stat[12])) / _TICK
            rss += int(stat[21]) * os.sysconf("SC_PAGESIZE") / 2**20
            threads += int(stat[17])
        return Usage(cpu, rss, threads, files)


def ours(pipeline: str, blocks: int, threads: int) -> list[str]:
    """The command of our server, but for the port."""
    options = {"pipeline": pipeline, "blocks": blocks, "threads": threads}
    return [sys.executable, str(Path(__file__)), json.dumps(options)]


def vllm(python: str, folder: Path) -> list[str]:
    """The command of vLLM's server, but for the port; fp32, with its prefix cache on."""
    return [
        python,
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "smollm2-135m"),
        *("--dtype", "float32", "--max-model-len", "8192", "--max-num-seqs", "64"),
        *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
    ]


@contextmanager
def started(name: str, command: Sequence[str], patience: float = 600.0) -> Iterator[Process]:
    """Start a server on a free port, wait until it is healthy; at the end, SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    full = [*command, "--port", str(port), "--host", "127.0.0.1"]
    url = f"http://127.0.0.1:{port}"
    environment = {**VLLM_ENVIRONMENT, **os.environ}
    with subprocess.Popen(
        full, stdout=subprocess.DEVNULL, start_new_session=True, env=environment
    ) as process:
        try:
            end = time.monotonic() + patience
            while not _healthy(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{name} does not start: {' '.join(full)}")
                time.sleep(0.2)
            yield Process(name, url, "smollm2-135m", process.pid)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        found += _children(parent)
    return found


def _children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _serve(options: dict[str, int | str], host: str, port: int) -> None:
    from sagellm_ir.runtime.native import set_defaults

    set_defaults()  # as our commands do, before torch is loaded
    import torch

    from sagellm_ir.runtime import SageLLMEngine
    from sagellm_ir.runtime.config import LimitsConfig, ServerConfig
    from sagellm_ir.runtime.engines import load_backend
    from sagellm_ir.runtime.server.main import serve

    torch.set_num_threads(int(options["threads"]))
    tiers = {"device": {"blocks": options["blocks"]}, "host": {"blocks": 0}}
    loaded = load_backend("embedded", "smollm2-135m", overrides={"tiers": tiers})
    engine = SageLLMEngine(loaded, pipeline=str(options["pipeline"]))
    serve(engine, ServerConfig(host=host, port=port), LimitsConfig())


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]), sys.argv[5], int(sys.argv[3]))
