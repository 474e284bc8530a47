"""`Trace`: what an engine ran, forward by forward, in one format for all engines; and how two differ.

An engine with a `trace` reports the rows it really ran and the blocks that these rows really used.
Physical block numbers are its own. To compare engines, `contents` names each block after the row
that wrote it, and follows copies; so equal names are equal sharing, wherever the blocks lie.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from attrs import define, field, frozen
from cattrs import BaseValidationError, Converter, transform_error

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.files import read_text, write_atomic
from sagellm_ir.lowering.plan import KVMove
from sagellm_ir.runtime.backend import InferenceBackend
from sagellm_ir.target import DEVICE

__all__ = [
    "Chunk",
    "Forward",
    "Trace",
    "TraceRow",
    "Traced",
    "chunks",
    "contents",
    "differences",
    "load_trace",
    "recording",
]

VERSION = 1
_MOST = 10
"""Differences that are told, at most."""


@frozen
class TraceRow:
    """Tokens `[start, stop)` of a request, in one forward."""

    request: str
    start: int
    stop: int
    decode: bool
    blocks: tuple[int, ...]
    """The device blocks of `[0, stop)`, in the engine's numbers."""


@frozen
class Forward:
    """One forward of a worker, and the copies since its last one."""

    worker: str
    moves: tuple[KVMove, ...]
    rows: tuple[TraceRow, ...]


@define
class Trace:
    """What an engine ran. Give it to an engine as its `trace` to record."""

    engine: str
    block_size: int
    forwards: list[Forward] = field(factory=list)
    _moves: dict[str, list[KVMove]] = field(factory=dict, init=False)

    def moved(self, worker: str, move: KVMove) -> None:
        """Blocks were copied."""
        self._moves.setdefault(worker, []).append(move)

    def ran(self, worker: str, rows: Iterable[TraceRow]) -> None:
        """A forward was run."""
        moves = tuple(self._moves.pop(worker, ()))
        self.forwards.append(Forward(worker, moves, tuple(rows)))

    def cut(self, table: Sequence[int], tokens: int) -> tuple[int, ...]:
        """The blocks of a table that hold its first tokens."""
        return tuple(table[: -(-tokens // self.block_size)])

    def save(self, path: Path) -> None:
        """Write it as JSON lines: a header, then a forward a line."""
        header = {"sagellm_trace": VERSION, "engine": self.engine, "block_size": self.block_size}
        lines = (json.dumps(line) for line in (header, *map(_CONVERTER.unstructure, self.forwards)))
        write_atomic(path, "\n".join(lines) + "\n")


@runtime_checkable
class Traced(Protocol):
    """An engine that can record what it runs."""

    trace: Trace | None


@contextmanager
def recording(engine: InferenceBackend, block_size: int, path: Path | None) -> Iterator[None]:
    """Record what an engine runs meanwhile, and write it to a file; without one, do nothing.

    Raises:
        SageIRError: the engine keeps no trace, or the file cannot be written.
    """
    if path is None:
        yield
        return
    name = engine.capability.engine
    if not isinstance(engine, Traced):
        raise SageIRError(Diagnostic(f"engine {name!r} does not say what it runs: no --trace"))
    engine.trace = Trace(name, block_size)
    try:
        yield
        engine.trace.save(path)
    finally:
        engine.trace = None


T = TypeVar("T")
_CONVERTER = Converter(forbid_extra_keys=True)


def load_trace(path: Path) -> Trace:
    """Read what `Trace.save` wrote.

    Raises:
        SageIRError: the file cannot be read, or is no trace of this version; with the line.
    """
    lines = read_text(path).splitlines()
    if not lines:
        raise _broken(path, 1, "it is empty")
    trace = _parse(path, 1, lines[0], _header)
    trace.forwards += [_parse(path, n, line, _forward) for n, line in enumerate(lines[1:], 2)]
    return trace


def _header(data: Any) -> Trace:
    if not isinstance(data, dict) or data.get("sagellm_trace") != VERSION:
        raise ValueError(f"it has no header of version {VERSION}")
    return Trace(str(data["engine"]), int(data["block_size"]))


def _forward(data: Any) -> Forward:
    return _CONVERTER.structure(data, Forward)


def _parse(path: Path, number: int, line: str, read: Callable[[Any], T]) -> T:
    try:
        return read(json.loads(line))
    except BaseValidationError as error:
        raise _broken(path, number, "; ".join(transform_error(error))) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _broken(path, number, str(error)) from error


def _broken(path: Path, line: int, why: str) -> SageIRError:
    return SageIRError(Diagnostic(f"{path}:{line}: not a trace: {why}"))


# Comparing.

Chunk = tuple[str, int, int]
"""Request, and the prompt tokens `[start, stop)` that were run."""
Name = tuple[str, int]
"""A block's content: the request that wrote it, and which of its blocks it was."""


def chunks(trace: Trace) -> list[Chunk]:
    """The prefill chunks in the order they ran; those of one forward in order of their requests."""
    return [
        chunk
        for forward in trace.forwards
        for chunk in sorted((r.request, r.start, r.stop) for r in forward.rows if not r.decode)
    ]


def contents(trace: Trace) -> Iterator[tuple[TraceRow, tuple[Name | None, ...]]]:
    """Each row, and what its blocks hold when it reads them; None: written before the trace."""
    size = trace.block_size
    names: dict[tuple[str, str, int], Name | None] = {}
    for forward in trace.forwards:
        worker = forward.worker
        for move in forward.moves:
            origin = move.from_worker or worker
            taken = [names.get((origin, move.from_tier, block)) for block in move.src]
            names.update(
                {(worker, move.to_tier, b): n for b, n in zip(move.dst, taken, strict=True)}
            )
        for row in forward.rows:  # every row writes before any reads, in each layer
            for at in range(-(-row.start // size), -(-row.stop // size)):
                names[worker, DEVICE, row.blocks[at]] = (row.request, at)
        for row in forward.rows:
            yield row, tuple(names.get((worker, DEVICE, block)) for block in row.blocks)


def differences(one: Trace, other: Trace) -> list[str]:
    """What two engines did differently with one plan: chunks, their order, sharing, decodes.

    How rows are batched into forwards may differ: not every engine mixes prefill and decode.
    """
    found = []
    pair = f"{one.engine} and {other.engine}"
    ours, theirs = chunks(one), chunks(other)
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        found.append(f"{pair}: chunk {at} differs: {ours[at : at + 1]} and {theirs[at : at + 1]}")
    held = [_prefill_contents(trace) for trace in (one, other)]
    found += [
        f"{pair}: {chunk} reads {held[0][chunk]} and {held[1][chunk]}"
        for chunk in held[0]
        if held[0][chunk] != held[1].get(chunk, held[0][chunk])
    ]
    decoded = [
        Counter(r.request for f in t.forwards for r in f.rows if r.decode) for t in (one, other)
    ]
    if decoded[0] != decoded[1]:
        names = sorted(n for n in decoded[0] | decoded[1] if decoded[0][n] != decoded[1][n])
        found.append(f"{pair}: the decodes of {', '.join(names)} differ in number")
    return found[:_MOST]


def _prefill_contents(trace: Trace) -> dict[Chunk, list[tuple[Name | None, ...]]]:
    """What each chunk read, by chunk, in order where one ran again."""
    found: dict[Chunk, list[tuple[Name | None, ...]]] = {}
    for row, held in contents(trace):
        if not row.decode:
            found.setdefault((row.request, row.start, row.stop), []).append(held)
    return found
