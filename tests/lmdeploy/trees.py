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


def _patched() -> Path:
    """A folder name that changes with the patches, so that a stale tree is never tested."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "patches" / "lmdeploy").glob("*.patch")):
        digest.update(path.read_bytes())
    return BUILD / f"patched-{digest.hexdigest()[:12]}"


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
    """What `tests.lmdeploy.recordings` prints on the stock tree; made once, for all test processes."""
    sources = (HERE / "recordings.py", HERE / "cpu.py", Path(sys.executable))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources[:2]))
    digest.update(str(sources[2]).encode())
    cache = BUILD / f"recorded-{digest.hexdigest()[:12]}.json"
    with _locked():
        if not cache.is_file():
            for stale in BUILD.glob("recorded-*"):
                stale.unlink()
            cache.write_text(_record())
    return json.loads(cache.read_text())


def _record() -> str:
    paths = os.pathsep.join([str(STOCK), str(ROOT), str(SITE)])
    run = subprocess.run(
        [sys.executable, "-m", "tests.lmdeploy.recordings"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


PATCHED = _patched()
