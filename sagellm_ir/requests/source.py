"""Bytes -> JSON values: opens a source, decompresses it, finds its format, yields its records.

| name ends in | read as |
|---|---|
| `.jsonl`, `.ndjson` | one JSON value a line |
| `.json` | JSON values one after the other; an array of requests is its elements |
| `.csv` | rows under a header line |
| `.txt`, `.md` | one prompt: the whole text |
| anything else, stdin | whichever of these its first line looks like |

`.xz`, `.gz` and (with the optional `zstandard`) `.zst` may follow.
"""

import csv
import gzip
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path, PurePath
from typing import IO, Any, TextIO, cast

from attrs import frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.nodes import Location

__all__ = ["DEFAULT_LIMITS", "Limits", "Record", "Source", "records"]

Source = str | Path | TextIO
Line = tuple[int, bytes]

_BLANK = re.compile(r"\s*")
_REQUESTS = re.compile(r'\[\s*[\[{"]')
_WINDOW = 60


@frozen
class Limits:
    """How much of an untrusted source is read before it is refused, in bytes after decompression."""

    line: int = 64 << 20
    total: int = 4 << 30


DEFAULT_LIMITS = Limits()


@frozen
class Record:
    """One JSON value, and where it starts."""

    value: Any
    loc: Location


def records(source: Source, limits: Limits) -> Iterator[Record | Diagnostic]:
    """The records of a source; a `Diagnostic` stands for a line that could not be read.

    Raises:
        SageIRError: the source itself cannot be read: missing, not decompressible, too large, or
            JSON that is broken in a way that leaves no next record to go on with.
    """
    with ExitStack() as stack:
        name, stream = _open(source, stack)
        try:
            yield from _parse(name, _lines(name, stream, limits))
        except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            raise SageIRError(Diagnostic(f"cannot read {name}: {error}")) from error


def _open(source: Source, stack: ExitStack) -> tuple[str, IO[Any]]:
    """The source's name for messages, and its decompressed bytes (or text)."""
    if not isinstance(source, str | Path):
        return str(getattr(source, "name", "<stream>")), source
    if str(source) == "-":
        return "<stdin>", getattr(sys.stdin, "buffer", sys.stdin)
    path = Path(source)
    try:
        file = stack.enter_context(path.open("rb"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise SageIRError(Diagnostic(f"cannot read {path}: {reason}")) from error
    match path.suffix:
        case ".xz":
            return str(path), stack.enter_context(lzma.open(file))
        case ".gz":
            return str(path), cast(IO[bytes], stack.enter_context(gzip.open(file)))
        case ".zst":
            return str(path), stack.enter_context(_zstd(path, file))
    return str(path), file


def _zstd(path: Path, file: IO[bytes]) -> IO[bytes]:
    """A decompressing reader; windows up to 128 MiB (`zstd --long=27`)."""
    try:
        zstandard = importlib.import_module("zstandard")
    except ModuleNotFoundError:
        message = f"cannot read {path}: reading .zst needs the optional package 'zstandard'"
        help_ = "pip install zstandard, or decompress the file first (zstd -d --long=27)"
        raise SageIRError(Diagnostic(message, help=help_)) from None
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(file)
    return io.BufferedReader(_OneError(reader, zstandard.ZstdError))


class _OneError(io.RawIOBase):
    """A raw reader whose library-specific error becomes an `OSError`."""

    def __init__(self, reader: Any, error: type[Exception]) -> None:
        self._reader, self._error = reader, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._reader.readinto(buffer))
        except self._error as error:
            raise OSError(str(error)) from error


def _lines(name: str, stream: IO[Any], limits: Limits) -> Iterator[Line]:
    """Numbered lines as bytes, never holding more than one line over the limit."""
    total = number = 0
    while line := stream.readline(limits.line + 1):
        number += 1
        if isinstance(line, str):
            line = line.encode("utf-8", "surrogatepass")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        total += len(line)
        if len(line) > limits.line or total > limits.total:
            what, limit = ("a line", limits.line) if total <= limits.total else ("it", limits.total)
            message = f"{what} is larger than the limit of {limit} bytes"
            raise SageIRError(Diagnostic(message, Location(name, number), help="split the file"))
        yield number, line


def _parse(name: str, lines: Iterator[Line]) -> Iterator[Record | Diagnostic]:
    """Picks the reader of a format by the name's suffix, else by the first line that has text."""
    suffixes = [s for s in PurePath(name).suffixes if s not in (".xz", ".gz", ".zst")]
    match suffixes[-1] if suffixes else "":
        case ".jsonl" | ".ndjson":
            return _json_lines(name, lines)
        case ".csv":
            return _csv(name, lines)
        case ".txt" | ".md":
            return _text(name, lines)
        case suffix:
            return _sniff(name, lines, json_only=suffix == ".json")


def _sniff(name: str, lines: Iterator[Line], json_only: bool) -> Iterator[Record | Diagnostic]:
    head: list[Line] = []
    for number, line in lines:
        head.append((number, line))
        if line.strip():
            break
    lines, first = chain(head, lines), head[-1][1].strip() if head else b""
    if first[:1] in (b"{", b"[", b'"') or json_only:
        complete = isinstance(_decode(name, head[-1] if head else (1, b"")), Record)
        return _json_lines(name, lines) if complete else _json_document(name, lines)
    if first.startswith(b"TIMESTAMP,"):
        return _csv(name, lines)
    return _text(name, lines)


def _json_lines(name: str, lines: Iterable[Line]) -> Iterator[Record | Diagnostic]:
    for line in lines:
        if not line[1].strip():
            continue
        record = _decode(name, line)
        if isinstance(record, Record) and _is_array_of_requests(record.value):
            yield from (Record(value, record.loc) for value in record.value)
        else:
            yield record


def _decode(name: str, line: Line) -> Record | Diagnostic:
    """The JSON value of one line."""
    number, data = line
    try:
        text = data.decode().rstrip()  # of bytes, json guesses the encoding
        return Record(json.loads(text), Location(name, number))
    except json.JSONDecodeError as error:
        return _broken(name, number, text, error)
    except UnicodeDecodeError as error:
        return _not_utf8(Location(name, number, error.start + 1))
    except (RecursionError, ValueError) as error:
        return Diagnostic(f"JSON that cannot be read: {error}", Location(name, number))


def _json_document(name: str, lines: Iterable[Line]) -> Iterator[Record]:
    """JSON values separated by blank space; arrays of requests are flattened."""
    text = _join(name, lines)
    decoder = json.JSONDecoder()
    inside, at = False, _skip(text, 0)
    try:
        while at < len(text):
            loc = Location(name, text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at))
            if not inside and _REQUESTS.match(text, at):
                inside, at = True, _skip(text, at + 1)
                continue
            value, at = decoder.raw_decode(text, at)
            yield Record(value, loc)
            at = _skip(text, at)
            if inside and text[at : at + 1] == ",":
                at = _skip(text, at + 1)
            elif inside and text[at : at + 1] == "]":
                inside, at = False, _skip(text, at + 1)
            elif inside:
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if inside:
            raise json.JSONDecodeError("Expecting value", text, at)
    except json.JSONDecodeError as error:
        raise SageIRError(_broken(name, 1, text, error)) from error
    except (RecursionError, ValueError) as error:
        message = f"JSON that cannot be read: {error}"
        raise SageIRError(Diagnostic(message, Location(name, 1))) from error


def _csv(name: str, lines: Iterable[Line]) -> Iterator[Record]:
    text = _join(name, lines)
    reader = csv.DictReader(io.StringIO(text), restkey="a further column")
    try:
        for row in reader:
            yield Record(row, Location(name, reader.line_num))
    except csv.Error as error:
        loc = Location(name, reader.line_num + 1)
        raise SageIRError(Diagnostic(f"CSV that cannot be read: {error}", loc)) from error


def _text(name: str, lines: Iterable[Line]) -> Iterator[Record]:
    text = _join(name, lines)
    if "\0" in text:
        help_ = "requests are JSON, CSV or text; unpack an archive, and name the files in it"
        raise SageIRError(Diagnostic(f"{name} is no text: it has NUL characters", help=help_))
    if text:
        yield Record(text, Location(name, 1))


def _join(name: str, lines: Iterable[Line]) -> str:
    """All lines as text."""
    try:
        return b"".join(line for _, line in lines).decode()
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise SageIRError(_not_utf8(Location(name, line, column))) from error


def _skip(text: str, at: int) -> int:
    """The next position that is not blank."""
    found = _BLANK.match(text, at)
    return found.end() if found else at


def _is_array_of_requests(value: Any) -> bool:
    """Whether an array holds requests; an array of numbers is one prompt of token ids."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict | list | str)


def _not_utf8(loc: Location) -> Diagnostic:
    return Diagnostic("not UTF-8 text", loc, help="save the file as UTF-8")


def _broken(name: str, number: int, text: str, error: json.JSONDecodeError) -> Diagnostic:
    """A JSON error, with the text around it and a caret; `number` is the line `text` starts on."""
    at = min(error.pos, len(text.rstrip()))
    ended = at < error.pos or at == len(text) or error.msg.startswith("Unterminated")
    reason = "it ends too early, as a truncated file does" if ended else error.msg
    before = text[:at].split("\n")
    column = len(before[-1]) + 1
    line = before[-1] + text[at:].split("\n")[0].rstrip("\r")
    start = max(0, column - 1 - _WINDOW // 2)
    window = f"  {line[start : start + _WINDOW]}\n  {' ' * (column - 1 - start)}^"
    loc = Location(name, number + len(before) - 1, column)
    return Diagnostic(f"not JSON: {reason}", loc, window=window)
