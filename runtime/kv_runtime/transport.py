"""Two `TransportEngine`s: between engines of one process, and between the ranks of a group."""

from queue import Empty, Full, Queue

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.runtime.protocols.comm import CommBackendProtocol
from sagellm_ir.runtime.protocols.transport import MAX_CHUNK_BYTES, KVChunk

__all__ = ["CommTransport", "LocalExchange"]

_HELD = 8
"""Chunks that may wait on one way."""


class LocalExchange:
    """Ends by name, in one process; safe to use from several threads. Nothing is copied.

    Args:
        names: of the ends.
        timeout: seconds to wait for room, or for a chunk.
    """

    def __init__(self, names: tuple[str, ...], timeout: float) -> None:
        self.timeout = timeout
        self._names = names
        self._ways: dict[tuple[str, str], Queue[KVChunk]] = {
            (sender, to): Queue(_HELD) for sender in names for to in names
        }

    def end(self, name: str) -> "LocalEnd":
        """The end of this name; `SageIRError` when there is none."""
        self.check(name)
        return LocalEnd(self, name)

    def check(self, name: str) -> None:
        """Raise `SageIRError` unless there is an end of this name."""
        if name not in self._names:
            message = f"no end of the exchange is called {name!r}"
            raise SageIRError(Diagnostic(message, help=suggest(name, self._names)))

    def way(self, sender: str, to: str) -> "Queue[KVChunk]":
        """The chunks between two ends."""
        self.check(sender)
        self.check(to)
        return self._ways[sender, to]


class LocalEnd:
    """One end of a `LocalExchange`: a `TransportEngine`."""

    def __init__(self, exchange: LocalExchange, name: str) -> None:
        self._exchange = exchange
        self.name = name

    def send(self, chunk: KVChunk, to: str) -> None:
        """See `TransportEngine`."""
        try:
            self._exchange.way(self.name, to).put(chunk, timeout=self._exchange.timeout)
        except Full:
            raise SageIRError(Diagnostic(f"{to!r} took no KV chunk in time")) from None

    def receive(self, sender: str) -> KVChunk:
        """See `TransportEngine`."""
        try:
            return self._exchange.way(sender, self.name).get(timeout=self._exchange.timeout)
        except Empty:
            raise SageIRError(Diagnostic(f"no KV chunk came from {sender!r} in time")) from None


class CommTransport:
    """Chunks as messages between ranks, which are named by their numbers. A `TransportEngine`.

    Args:
        comm: the group.
        most: bytes of one chunk on the wire, at most.
    """

    def __init__(self, comm: CommBackendProtocol, most: int = MAX_CHUNK_BYTES) -> None:
        self._comm = comm
        self._most = most

    def send(self, chunk: KVChunk, to: str) -> None:
        """See `TransportEngine`."""
        rank = self._rank(to)
        self._comm.send(chunk.to_bytes(), rank)

    def receive(self, sender: str) -> KVChunk:
        """See `TransportEngine`."""
        rank = self._rank(sender)
        return KVChunk.from_bytes(self._comm.receive(rank, self._most))

    def _rank(self, name: str) -> int:
        others = [str(rank) for rank in range(self._comm.size) if rank != self._comm.rank]
        if name not in others:
            message = f"no other rank is called {name!r}"
            raise SageIRError(Diagnostic(message, help=suggest(name, others)))
        return int(name)
