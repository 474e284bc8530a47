"""Applies `patches/lmdeploy/*.patch` to LMDeploy's Python files, and takes them back.

A file is recognised by content: *stock* when its hash is the pinned one, *patched* when undoing the
patches gives that hash. So no state is kept beside the files, applying twice does nothing, and a
tree that was left half-way (a crash) is finished or undone by the next call.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from attrs import frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.engines.lmdeploy.source import ROOT, Pin, find_tree, load_pin
from sagellm_ir.runtime.engines.lmdeploy.unidiff import (
    FileDiff,
    PatchMismatch,
    apply_diffs,
    parse_diff,
)

__all__ = ["FileState", "PatchStatus", "State", "apply", "revert", "status"]

State = Literal["stock", "patched", "half", "unknown"]
FileStateName = Literal["stock", "patched", "unknown", "missing"]


@frozen
class FileState:
    """One file that the patches change or make."""

    path: str
    state: FileStateName


@frozen
class PatchStatus:
    """A source tree, and how far it is patched."""

    root: Path
    """The folder that holds `lmdeploy/`."""
    version: str
    state: State
    patches: tuple[str, ...]
    files: tuple[FileState, ...]
    changed: int = 0
    """Files that the call wrote or removed."""


def apply(target: str | Path | None = None) -> PatchStatus:
    """Patch a tree: all files or none. Patching a patched tree changes nothing.

    Args:
        target: a folder that holds `lmdeploy/`; "installed" for the installed distribution; None for
            the submodule `third_party/lmdeploy` when it is checked out, else for the Python files of
            the pinned wheel, unpacked into `build/lmdeploy/src` (the wheel is downloaded by pip when
            `build/lmdeploy` has none).

    Raises:
        SageIRError: no LMDeploy there, another version, or files that someone else changed.
    """
    return _change(target, patched=True)


def revert(target: str | Path | None = None) -> PatchStatus:
    """Undo `apply`, with the same arguments and errors."""
    return _change(target, patched=False)


def status(target: str | Path | None = None) -> PatchStatus:
    """How far a tree is patched; same arguments as `apply`, but nothing is downloaded or changed.

    Raises:
        SageIRError: there is no LMDeploy of the pinned version there.
    """
    return _inspect(find_tree(target, make=False))


def _change(target: str | Path | None, patched: bool) -> PatchStatus:
    root = find_tree(target, make=patched)
    before = _inspect(root)
    odd = [file for file in before.files if file.state in ("unknown", "missing")]
    if odd:
        raise SageIRError(
            Diagnostic(
                f"{root} has files that are neither those of LMDeploy {before.version} nor ours",
                notes=tuple(f"{file.path}: {file.state}" for file in odd),
                help="install LMDeploy again, or name another folder with --target",
            )
        )
    wanted = _texts(root, patched)
    now = {path: _read(root / path) for path in wanted}
    changes = {path: text for path, text in wanted.items() if text != now[path]}
    _write(root, changes, now)
    after = _inspect(root)
    return PatchStatus(
        root, after.version, after.state, after.patches, after.files, changed=len(changes)
    )


def _inspect(root: Path) -> PatchStatus:
    pin, diffs = load_pin(), _diffs()
    version = _version(root)
    if version != pin.version:
        raise SageIRError(
            Diagnostic(
                f"{root} holds LMDeploy {version}; the patches are made for {pin.version}",
                help=f"pip install lmdeploy=={pin.version} (docs/lmdeploy.md says why no other works)",
            )
        )
    files = tuple(
        FileState(path, _file_state(root, path, pin, diffs)) for path in _paths(pin, diffs)
    )
    return PatchStatus(root, version, _tree_state(files), tuple(_patches()), files)


def _tree_state(files: tuple[FileState, ...]) -> State:
    # version.py is checked but not changed, so it says nothing about the tree.
    states = {file.state for file in files if file.path != "lmdeploy/version.py"}
    if states & {"unknown", "missing"}:
        return "unknown"
    if states == {"stock"}:
        return "stock"
    return "patched" if states == {"patched"} else "half"


def _version(root: Path) -> str:
    text = _read(root / "lmdeploy" / "version.py") or ""
    match = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    return match.group(1) if match else "of an unknown version"


def _file_state(root: Path, path: str, pin: Pin, diffs: tuple[FileDiff, ...]) -> FileStateName:
    text = _read(root / path)
    if _is_stock(text, pin.files.get(path)):
        return "stock"
    if text is None:
        return "missing"
    try:
        stock = apply_diffs({path: text}, _only(path, diffs, undo=True))[path]
    except PatchMismatch:
        return "unknown"
    return "patched" if _is_stock(stock, pin.files.get(path)) else "unknown"


def _is_stock(text: str | None, sha256: str | None) -> bool:
    """Files that a patch makes have no hash, and are stock when absent."""
    if text is None or sha256 is None:
        return text is None and sha256 is None
    return hashlib.sha256(text.encode()).hexdigest() == sha256


def _texts(root: Path, patched: bool) -> dict[str, str | None]:
    """What every file shall hold."""
    pin, diffs = load_pin(), _diffs()
    out: dict[str, str | None] = {}
    for path in _paths(pin, diffs):
        text = _read(root / path)
        is_stock = _is_stock(text, pin.files.get(path))
        todo = _only(path, diffs, undo=not patched) if is_stock == patched else ()
        out |= apply_diffs({path: text}, todo)
    return out


def _write(root: Path, changes: Mapping[str, str | None], before: Mapping[str, str | None]) -> None:
    """Write all changes or, after a failure, put back what was there."""
    done: list[str] = []
    try:
        for path, text in changes.items():
            done.append(path)
            _replace(root / path, text)
    except BaseException:
        for path in done:
            _replace(root / path, before[path])
        raise


def _replace(path: Path, text: str | None) -> None:
    """A new file in place of the old: installers link files to a cache that must not change."""
    if text is None:
        path.unlink(missing_ok=True)
        return
    fresh = path.with_name(f".{path.name}.sagellm-ir")
    try:
        fresh.write_bytes(text.encode())
        if path.exists():
            shutil.copymode(path, fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    return path.read_bytes().decode() if path.is_file() else None


def _patches() -> list[str]:
    return sorted(path.name for path in (ROOT / "patches" / "lmdeploy").glob("*.patch"))


def _diffs() -> tuple[FileDiff, ...]:
    folder = ROOT / "patches" / "lmdeploy"
    return tuple(diff for name in _patches() for diff in parse_diff((folder / name).read_text()))


def _only(path: str, diffs: tuple[FileDiff, ...], undo: bool) -> list[FileDiff]:
    mine = [diff for diff in diffs if diff.path == path]
    return [diff.reversed() for diff in reversed(mine)] if undo else mine


def _paths(pin: Pin, diffs: tuple[FileDiff, ...]) -> list[str]:
    return sorted({*pin.files, *(diff.path for diff in diffs)})


def main() -> int:
    """`third_party/apply_patches.sh` without the command line of sagellm-ir."""
    actions = {"apply": apply, "revert": revert, "status": status}
    parser = argparse.ArgumentParser(prog="apply_patches.sh", description=__doc__.split("\n")[0])
    parser.add_argument("action", nargs="?", default="apply", choices=actions)
    parser.add_argument("--target", help="a folder that holds lmdeploy/, or 'installed'")
    options = parser.parse_args()
    try:
        result = actions[options.action](options.target)
    except SageIRError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"LMDeploy {result.version} in {result.root}: {result.state}, {result.changed} files changed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
