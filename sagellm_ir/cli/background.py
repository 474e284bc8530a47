"""`llm engine start` without `--foreground`: the same command in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from sagellm_ir.cli import shared
from sagellm_ir.diagnostics import Diagnostic, SageIRError

if TYPE_CHECKING:
    from sagellm_ir.runtime.config import SageConfig
    from sagellm_ir.runtime.control_plane.processes import EngineProcess, Engines

__all__ = ["free_id", "start_behind", "words_of"]

LOG_TAIL = 4096
"""Characters of a failed engine's log that its user is shown."""


def free_id(engines: "Engines") -> str:
    """The first of `sagellm-0`, `sagellm-1`, ... that no engine of this machine has."""
    number = 0
    while engines.get(f"sagellm-{number}") is not None:
        number += 1
    return f"sagellm-{number}"


def words_of(
    config: "SageConfig",
    kv_schema: str | None,
    file: Path | None,
    gateway: str | None,
    patient: bool,
) -> list[str]:
    """The same start, as words for a process of its own."""
    chosen, server = config.engine, config.server
    words = ["llm", "engine", "start", chosen.model, "--foreground", "--engine-id", chosen.id]
    words += ["--backend", chosen.backend, "--pipeline", chosen.pipeline]
    words += ["--host", server.host, "--port", str(server.port)]
    words += ["--instance-type", config.control_plane.instance_type]
    words += ["--kv-schema", kv_schema] if kv_schema else []
    words += ["--config", str(file)] if file else []
    if gateway is None:
        words.append("--alone")
    elif not patient:
        words += ["--gateway", gateway]
    return words


def start_behind(
    engines: "Engines", engine_id: str, words: list[str], wait: float
) -> "EngineProcess":
    """Start a process and wait until it serves.

    Raises:
        SageIRError: it ends before that, or takes too long; what it said is told.
    """
    path = engines.log(engine_id)
    with open(path, "w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "sagellm_ir", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until = time.monotonic() + wait
    with shared.working(f"starting engine {engine_id}"):
        while child.poll() is None:
            process = engines.get(engine_id)
            if process is not None and process.pid == child.pid and process.ready:
                return process
            if time.monotonic() > until:
                child.terminate()
                message = f"engine {engine_id!r} does not serve after {wait:g} s"
                raise SageIRError(Diagnostic(message, help=f"its log: {path}"))
            time.sleep(0.05)
    said = path.read_text(errors="replace")[-LOG_TAIL:].strip()
    message = f"engine {engine_id!r} ended before it served; the end of its log:"
    raise SageIRError(Diagnostic(message, window=indent(said, "  | ")))
