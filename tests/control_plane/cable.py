"""A TCP cable to a server that can be cut: to whoever holds its end, the server's process is gone."""

import asyncio
import contextlib

__all__ = ["Cable"]


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

    async def __aenter__(self) -> "Cable":
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        """Reset all connections, and listen no more."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _connect(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far, out = await asyncio.open_connection("127.0.0.1", self._far)
            self._writers += [back, out]
            await asyncio.gather(self._pass(near, out), self._pass(far, back, counted=True))

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counted: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                self.posts += data.count(b"POST /v1/c")
                if counted and self.after is not None:
                    self.after -= data.count(b"data: {")
                    if self.after < 0:
                        self.cut()
                        return
                sink.write(data)
                await sink.drain()
            sink.write_eof()
