"""`write_atomic`: what is there already stays what it is."""

import os
import stat
import threading
from pathlib import Path

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.files import read_text, write_atomic


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    write_atomic(secret, "x")
    assert secret.read_text() == "x"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    write_atomic(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writing = threading.Thread(target=write_atomic, args=(pipe, b"through"))
    writing.start()
    assert pipe.read_bytes() == b"through"
    writing.join()
    assert pipe.is_fifo()


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(SageIRError, match=r"cannot write .*Is a directory"):
        write_atomic(folder, "x")
    with pytest.raises(SageIRError, match="No such file"):
        write_atomic(tmp_path / "no" / "file", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_cannot_be_read_is_told_in_words(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(SageIRError, match="it is not UTF-8 text"):
        read_text(binary)
    with pytest.raises(SageIRError, match=r"cannot read .*/none: No such file or directory"):
        read_text(tmp_path / "none")
