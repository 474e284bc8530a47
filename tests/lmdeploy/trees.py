"""LMDeploy's Python files, stock and patched, made from the pinned wheel.

`make build/lmdeploy/.ready` brings the wheel and what it imports.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sagellm_ir.runtime.engines.lmdeploy.patching import apply
from sagellm_ir.runtime.engines.lmdeploy.source import BUILD, ROOT, load_pin, unpack

HERE = Path(__file__).parent
SITE = BUILD / "site"
STOCK = BUILD / "stock"


def _digest(*paths: Path) -> str:
    """Part of a file name that changes with what it was made from."""
    digest = hashlib.sha256(sys.version.encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


PATCHED = BUILD / f"patched-{_digest(*sorted((ROOT / 'patches' / 'lmdeploy').glob('*.patch')))}"


@contextmanager
def _locked() -> Iterator[None]:
    """One of pytest-xdist's processes at a time."""
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare() -> bool:
    """Make the trees and put the patched one on the path; False: the wheel is not here."""
    wheels = [BUILD / name for name in load_pin().wheels if (BUILD / name).is_file()]
    if not wheels or not SITE.is_dir():
        return False
    with _locked():
        if not STOCK.is_dir():
            unpack(wheels[0], STOCK)
        if not PATCHED.is_dir():
            fresh = BUILD / f"fresh-{os.getpid()}"
            unpack(wheels[0], fresh)
            apply(fresh)
            for stale in BUILD.glob("patched-*"):
                shutil.rmtree(stale)
            fresh.rename(PATCHED)
    sys.path.insert(0, str(PATCHED))
    sys.path.append(str(SITE))
    return True


def recorded() -> Any:
    """What `tests.lmdeploy.recordings` prints on the stock tree; made once, for all processes."""
    cache = BUILD / f"recorded-{_digest(HERE / 'recordings.py', HERE / 'cpu.py')}.json"
    with _locked():
        if not cache.is_file():
            for stale in BUILD.glob("recorded-*"):
                stale.unlink()
            run = _start(STOCK, "tests.lmdeploy.recordings")
            out, err = run.communicate()
            assert run.returncode == 0, err
            cache.write_text(out.splitlines()[-1])
    return json.loads(cache.read_text())


def on_patched(module: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that runs a module on the patched tree."""
    return _start(PATCHED, module, *arguments)


def _start(tree: Path, module: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT), str(SITE)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
