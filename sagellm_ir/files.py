"""Text files are read whole, and written so that nobody ever sees half of one."""

import os
import stat
import tempfile
from pathlib import Path

from sagellm_ir.diagnostics import Diagnostic, SageIRError

__all__ = ["MAX_TEXT_BYTES", "read_text", "write_atomic"]

MAX_TEXT_BYTES = 1 << 30


def read_text(path: Path) -> str:
    """A whole text file.

    Raises:
        SageIRError: it does not exist, is no UTF-8 text, or is larger than `MAX_TEXT_BYTES`.
    """
    try:
        if (size := path.stat().st_size) > MAX_TEXT_BYTES:
            raise SageIRError(Diagnostic(f"{path} has {size} bytes; at most {MAX_TEXT_BYTES}"))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SageIRError(Diagnostic(f"cannot read {path}: {reason}")) from None


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all: into a temporary file beside it, then renamed.

    A link stays one, and a file keeps its mode. What is no file (`/dev/stdout`, a pipe) is written to as it is.

    Raises:
        SageIRError: it cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            _replace(path.resolve(), content)
    except OSError as error:
        raise SageIRError(Diagnostic(f"cannot write {path}: {error.strerror}")) from error


def _replace(path: Path, content: bytes) -> None:
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
