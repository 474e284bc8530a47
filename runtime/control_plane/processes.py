"""Engines that were started on this machine: one small file each in the user's state folder.

An engine holds a lock for as long as it lives, so a file whose lock is free is one that a crash left
behind, and no process id is ever signalled that has become another program's.
"""

import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import cattrs
from attrs import asdict, frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.files import write_atomic

__all__ = ["EngineProcess", "Engines", "state_folder"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FOLDER_VARIABLE = "SAGELLM_STATE_DIR"


def state_folder() -> Path:
    """`SAGELLM_STATE_DIR`, else `sagellm-ir` in the XDG state folder."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sagellm-ir"


@frozen
class EngineProcess:
    """A running engine."""

    engine_id: str
    pid: int
    backend: str
    model: str
    url: str | None = None
    """Where it serves; None: it still loads."""
    gateway: str | None = None
    """What it registers with."""

    @property
    def ready(self) -> bool:
        """Whether it serves."""
        return self.url is not None


class Engines:
    """The engines of this user on this machine.

    Raises:
        SageIRError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = (folder or state_folder()) / "engines"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make {self._folder}: {error.strerror}"
            help_ = f"set {FOLDER_VARIABLE} to a folder that can be written"
            raise SageIRError(Diagnostic(message, help=help_)) from None

    def log(self, engine_id: str) -> Path:
        """Where an engine in the background writes what it has to say."""
        return self._path(engine_id, "log")

    @contextmanager
    def claim(self, engine_id: str) -> Iterator[None]:
        """Hold the lock of an engine that this process is.

        Raises:
            SageIRError: the id is no name, or an engine of it runs.
        """
        with open(self._path(engine_id, "lock"), "a") as lock:
            if not _locked(lock, fcntl.LOCK_EX, patience=0.5):  # someone may be looking at it
                raise SageIRError(
                    Diagnostic(
                        f"an engine {engine_id!r} runs already",
                        help="give this one another --engine-id, or stop that one",
                    )
                )
            try:
                yield
            finally:
                self._path(engine_id, "json").unlink(missing_ok=True)

    def write(self, process: EngineProcess) -> None:
        """Note how an engine is; the one that has claimed it does."""
        path = self._path(process.engine_id, "json")
        write_atomic(path, json.dumps(asdict(process), indent=2) + "\n")

    def running(self) -> list[EngineProcess]:
        """All engines that live, by name."""
        ids = sorted(path.stem for path in self._folder.glob("*.json"))
        return [found for engine_id in ids if (found := self.get(engine_id)) is not None]

    def get(self, engine_id: str) -> EngineProcess | None:
        """An engine, if it lives."""
        if not self._claimed(engine_id):
            self._path(engine_id, "json").unlink(missing_ok=True)
            return None
        with suppress(OSError, ValueError, cattrs.BaseValidationError):
            text = self._path(engine_id, "json").read_text(encoding="utf-8")
            return cattrs.structure(json.loads(text), EngineProcess)
        return None

    def find(self, engine_id: str) -> EngineProcess:
        """An engine that lives.

        Raises:
            SageIRError: there is none of this id.
        """
        if (found := self.get(engine_id)) is None:
            names = [process.engine_id for process in self.running()]
            help_ = suggest(engine_id, names) or "none runs: `sagellm-ir llm engine start MODEL`"
            raise SageIRError(Diagnostic(f"no engine {engine_id!r} runs here", help=help_))
        return found

    def stop(self, engine_id: str, seconds: float, *, kill: bool = False) -> bool:
        """Ask an engine to drain and end; whether it ended in time.

        Args:
            engine_id: of an engine that lives.
            seconds: to wait for it.
            kill: end it at once after that.

        Raises:
            SageIRError: there is none of this id, or it is not this user's.
        """
        process = self.find(engine_id)
        try:
            os.kill(process.pid, signal.SIGTERM)
            if self._ended(engine_id, seconds):
                return True
            if kill:
                os.kill(process.pid, signal.SIGKILL)
                return self._ended(engine_id, 5.0)
        except ProcessLookupError:
            return True
        except PermissionError:
            message = f"engine {engine_id!r} is another user's"
            raise SageIRError(Diagnostic(message)) from None
        return False

    def _ended(self, engine_id: str, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._claimed(engine_id):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def _claimed(self, engine_id: str) -> bool:
        try:
            with open(self._path(engine_id, "lock")) as lock:
                return not _locked(lock, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def _path(self, engine_id: str, kind: str) -> Path:
        if not NAME.fullmatch(engine_id):
            message = f"engine id {engine_id!r}: expected letters, digits, '.', '_' and '-'"
            raise SageIRError(Diagnostic(message))
        return self._folder / f"{engine_id}.{kind}"


def _locked(file: TextIO, kind: int, patience: float = 0.0) -> bool:
    """Whether the lock could be had; it is given back when the file is closed."""
    until = time.monotonic() + patience
    while True:
        with suppress(OSError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
