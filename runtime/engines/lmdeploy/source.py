"""Where LMDeploy's source is: the pin, a tree to patch, the wheel it can be unpacked from."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import yaml
from attrs import frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError

__all__ = ["BUILD", "ROOT", "Pin", "fetch_wheel", "find_tree", "load_pin", "unpack"]

ROOT = Path(__file__).resolve().parents[3]
"""The repository, or the installed package: both hold `patches/` and `third_party/`."""
BUILD = ROOT / "build" / "lmdeploy"


@frozen
class Pin:
    """The LMDeploy that the patches are made for."""

    version: str
    tag: str
    commit: str
    wheels: Mapping[str, str]
    """sha256 by file name."""
    files: Mapping[str, str]
    """sha256 by path, of every file that a patch changes."""


def load_pin() -> Pin:
    """The pin, from `third_party/lmdeploy.VERSION`."""
    values = yaml.safe_load((ROOT / "third_party" / "lmdeploy.VERSION").read_text())
    return Pin(*(values[name] for name in ("version", "tag", "commit", "wheels", "files")))


def find_tree(target: str | Path | None, make: bool) -> Path:
    """The folder that holds `lmdeploy/` (`patching.apply` lists the targets).

    Raises:
        SageIRError: there is none; with `make`, the pinned wheel could not be had either.
    """
    if target == "installed":
        return _installed()
    if target is not None:
        return _holds(Path(target))
    submodule = ROOT / "third_party" / "lmdeploy"
    if (submodule / "lmdeploy" / "version.py").is_file():
        return submodule
    source = BUILD / "src"
    if make and not (source / "lmdeploy" / "version.py").is_file():
        unpack(fetch_wheel(BUILD), source)
    return _holds(source)


def _holds(root: Path) -> Path:
    if (root / "lmdeploy" / "version.py").is_file():
        return root
    raise SageIRError(
        Diagnostic(
            f"there is no LMDeploy in {root}",
            help="name a folder that holds lmdeploy/, or 'installed', with --target; "
            "or run `sagellm-ir patches apply` to unpack the pinned version",
        )
    )


def _installed() -> Path:
    spec = importlib.util.find_spec("lmdeploy")
    if spec is None or spec.origin is None:
        help = f"pip install lmdeploy=={load_pin().version}"
        raise SageIRError(Diagnostic("LMDeploy is not installed", help=help))
    return Path(spec.origin).parent.parent


def fetch_wheel(folder: Path) -> Path:
    """The pinned wheel in `folder`, downloaded by pip when it is not there.

    Any Python's wheel will do: their Python files are the same. The hash is checked.

    Raises:
        SageIRError: pip could not download it, or the file is not the pinned one.
    """
    pin = load_pin()
    found = [folder / name for name in pin.wheels if (folder / name).is_file()]
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--platform=manylinux2014_x86_64", "--python-version=3.11", "-q"]
        run = subprocess.run(
            [*command, "-d", str(folder), f"lmdeploy=={pin.version}"],
            check=False,
            capture_output=True,
            text=True,
        )
        found = [folder / name for name in pin.wheels if (folder / name).is_file()]
        if not found:
            notes = tuple(run.stderr.strip().splitlines()[-3:])
            help = f"put one of its wheels into {folder}: {', '.join(pin.wheels)}"
            message = f"the wheel of LMDeploy {pin.version} could not be downloaded"
            raise SageIRError(Diagnostic(message, notes=notes, help=help))
    wheel = found[0]
    with wheel.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != pin.wheels[wheel.name]:
        message = f"{wheel} is not the pinned wheel: its sha256 is {digest.hexdigest()}"
        raise SageIRError(Diagnostic(message, help="delete it and try again"))
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack the Python files of a wheel (3.4 MB of 370 MB), all or nothing."""
    fresh = folder.with_name(f".{folder.name}.sagellm-ir.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("lmdeploy/")]
        archive.extractall(fresh, [name for name in names if not name.startswith("lmdeploy/lib/")])
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)
