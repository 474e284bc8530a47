"""A TCP cable to a server that can be cut: to whoever holds its end, the server's process is gone."""

import asyncio
import contextlib

__all__ = ["Cable"]

EVENT = b"data: {"
"""How an event of a streamed answer begins."""


class Cable:
    """Listens on a port of its own, and passes bytes both ways until it is cut.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self._far = port
        self.after: int | None = None
        """Events of streamed answers that it still lets through before it cuts itself."""
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self.port = 0
        self.posts = 0
        """Requests that generate."""
        self.lost = asyncio.Event()
        """Set when it is cut."""

    async def __aenter__(self) -> "Cable":
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        """Reset all connections, and listen no more."""
        self.lost.set()
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _connect(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far, out = await asyncio.open_connection("127.0.0.1", self._far)
            for writer in (back, out):
                writer.transport.set_write_buffer_limits(0)  # what was passed arrives, cut or not
            self._writers += [back, out]
            if self.lost.is_set():  # while this connection was being made
                self.cut()
                return
            await asyncio.gather(self._pass(near, out), self._pass(far, back, counted=True))

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counted: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                self.posts += data.count(b"POST /v1/c")
                passed = self._passed(data) if counted else data
                sink.write(passed)
                await sink.drain()
                if len(passed) < len(data):
                    self.cut()
                    return
            sink.write_eof()

    def _passed(self, data: bytes) -> bytes:
        """The part of an answer up to the last event that may pass, also when all come at once."""
        if self.after is None:
            return data
        *events, rest = data.split(EVENT)
        kept = events[: self.after]
        if len(events) > self.after:
            return EVENT.join([*kept, events[self.after]])
        self.after -= len(events)
        return EVENT.join([*kept, rest])
