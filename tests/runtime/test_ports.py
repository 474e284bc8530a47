"""Ports come from SAGE when it is installed, from one table else, and from nowhere besides."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagellm_ir.runtime import ports
from sagellm_ir.runtime.ports import BuiltinPorts

ROOT = Path(__file__).parents[2]
NUMBERS = sorted({n for n in vars(BuiltinPorts).values() if isinstance(n, int)})
IN_CODE = re.compile(rf"(?<![\d.,_])(?:{'|'.join(map(str, NUMBERS))})(?![\d_]|[.,]\d)")
"""A number of the table, in anything that runs."""
AS_PORT = re.compile(
    r"(?:localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1?\]):[1-9]\d+|\bport\b['\"]?\s*[:= ]\s*[1-9]\d{3,}\b",
    re.IGNORECASE,
)
"""Any number where a port stands, in anything at all."""
CODE = {".py", ".yaml", ".yml", ".toml", ".sh", ".jinja", ".cfg", ".ini", ""}
TEXT = CODE | {".md", ".patch", ".txt", ".json"}
ALLOWED = {"runtime/ports.py", "tests/runtime/test_ports.py"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test looks for SAGE anew."""
    ports.ports.cache_clear()
    yield
    ports.ports.cache_clear()


def literal_ports(path: Path, text: str) -> list[str]:
    """Ports that a file writes out."""
    found = AS_PORT.findall(text)
    return found + (IN_CODE.findall(text) if path.suffix in CODE else [])


def test_no_other_file_holds_a_port() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines() if name not in ALLOWED]
    files = [file for file in files if file.suffix in TEXT and file.is_file()]
    assert len(files) > 100
    found = {
        str(file.relative_to(ROOT)): hits
        for file in files
        if (hits := literal_ports(file, file.read_text(encoding="utf-8", errors="replace")))
    }
    assert not found, "take ports from sagellm_ir.runtime.ports"


@pytest.mark.parametrize(
    "line",
    [f"x = {BuiltinPorts.GATEWAY_DEFAULT}", "http://localhost:4242/v1", "port: 4242", "port=4242"],
)
def test_the_search_finds(line: str) -> None:
    assert literal_ports(Path("a.py"), line)


def test_sage_and_the_table_agree() -> None:
    sage = pytest.importorskip("sage.foundation")
    assert ports.ports().origin == "isage"
    for name, number in vars(BuiltinPorts).items():
        if isinstance(number, int):
            assert getattr(sage.SagePorts, name) == number
    assert (
        ports.recommended_llm_port()
        == sage.SagePorts.get_recommended_llm_port()
        == BuiltinPorts.get_recommended_llm_port()
    )


def test_without_sage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sage.foundation", None)
    monkeypatch.setitem(sys.modules, "sage.common.config.ports", None)
    assert ports.ports().origin == "built in"
    assert ports.gateway_port() == BuiltinPorts.GATEWAY_DEFAULT


COMMON = """
import os
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "OFF")
from sagellm_ir.runtime.ports import BuiltinPorts
class SagePorts(BuiltinPorts):
    GATEWAY_DEFAULT = 4242
"""
"""What `isage-common` 0.2.5 does when it is imported, with a number of its own."""


def test_a_sage_that_sets_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sage_common_ports.py").write_text(COMMON)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ports, "_SOURCES", (("isage-common", "sage_common_ports"),))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert ports.gateway_port() == 4242
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_a_sage_of_another_shape_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sage_of_old.py").write_text("class SagePorts:\n    GATEWAY_DEFAULT = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ports, "_SOURCES", (("isage", "sage_of_old"),))
    assert ports.ports().origin == "built in"
