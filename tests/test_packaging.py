"""The wheel holds exactly the repository's code, under one top-level name."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("sagellm_ir", "passes", "lowering", "runtime")
SLOW = (
    "torch",
    "tokenizers",
    "safetensors",
    "transformers",
    "lmdeploy",
    "vllm",
    "networkx",
    "typer",
    "rich",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    [path] = out.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def sources() -> set[str]:
    """Every module of the repository, under the name it is imported by."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT)
            if relative.parts[:2] in {("sagellm_ir", name) for name in FOLDERS[1:]}:
                continue  # a link: the same file again
            found.add(str(relative if folder == "sagellm_ir" else Path("sagellm_ir") / relative))
    return found


def test_wheel_holds_every_module_once(wheel: list[str]) -> None:
    modules = [name for name in wheel if name.endswith(".py")]
    assert len(modules) == len(set(modules))
    assert set(modules) == sources()


def test_wheel_has_one_top_level_package(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"sagellm_ir"}


def test_wheel_holds_the_data_files(wheel: list[str]) -> None:
    assert "sagellm_ir/py.typed" in wheel
    assert "sagellm_ir/config/targets/cpu.yaml" in wheel
    assert any(name.endswith(".lark") for name in wheel)


def test_links_are_committed_as_links() -> None:
    for name in FOLDERS[1:]:
        link = ROOT / "sagellm_ir" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_importing_the_ir_imports_no_engine_and_no_cli() -> None:
    code = (
        "import sys, sagellm_ir, sagellm_ir.text, sagellm_ir.passes.manager, sagellm_ir.lowering.lower\n"
        f"print(*[name for name in {SLOW!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == ""
