"""`register`: an engine of this process, made known to a `ControlPlaneManager` here.

This is the only path on which all that a request says, and all that an answer measures, survives.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from sagellm_control import ControlPlaneManager, EngineInfo
from sagellm_protocol import Request as ProtocolRequest
from sagellm_protocol import Response as ProtocolResponse

from sagellm_ir.runtime.control_plane.attach import Figures
from sagellm_ir.runtime.control_plane.local import LocalMember
from sagellm_ir.runtime.control_plane.member import NOTHING, Member
from sagellm_ir.runtime.control_plane.protocol import Recorder, to_request
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine

__all__ = ["HealthDoor", "ProtocolEngine", "Registration", "register", "register_member"]

LOOPBACK = "127.0.0.1"


class ProtocolEngine:
    """A member in the shape that `register_engine(llm_engine=...)` asks for."""

    def __init__(self, member: Member, before: Callable[[], None] = lambda: None) -> None:
        self.engine_id, self.member = member.engine_id, member
        self._refresh = before

    async def execute(self, request: ProtocolRequest) -> ProtocolResponse:
        """The whole answer."""
        recorder = Recorder(request, self.engine_id)
        async for piece in self.member.stream(to_request(request), NOTHING):
            recorder.add(piece)
            self._refresh()
        return recorder.response()

    async def stream(self, request: ProtocolRequest) -> AsyncGenerator[Any, None]:
        """Start, deltas, end."""
        recorder = Recorder(request, self.engine_id)
        yield recorder.start()
        async with contextlib.aclosing(self.member.stream(to_request(request), NOTHING)) as pieces:
            async for piece in pieces:
                recorder.add(piece)
                self._refresh()
                if piece.text or piece.tokens:
                    yield recorder.delta(piece)
        yield recorder.end()

    async def health_check(self) -> bool:
        """The member's."""
        return await self.member.health_check()


class Registration:
    """An engine's place in a Control Plane. Close it to take the engine out."""

    def __init__(self, manager: ControlPlaneManager, info: EngineInfo, door: "HealthDoor") -> None:
        self.info = info
        """The live record: what is set here is what the Control Plane routes by."""
        self._manager, self._door = manager, door

    async def close(self) -> None:
        """Deregister the engine."""
        self._manager.unregister_engine(self.info.engine_id)
        await self._door.close()


async def register(
    manager: ControlPlaneManager,
    engine: SageLLMEngine,
    *,
    instance_type: str = "general",
    kv_schema: Mapping[str, Any] | None = None,
) -> Registration:
    """Make an engine known to a Control Plane of its process; see `register_member`.

    Args:
        manager: the Control Plane, started.
        engine: started too.
        instance_type: "general", "prefilling" or "decoding".
        kv_schema: the layout of its KV pages.

    Raises:
        ValueError: an engine of this id is registered.
    """
    member = LocalMember(engine)
    return await register_member(
        manager,
        member,
        engine.model_name,
        metadata=member.metadata(instance_type, kv_schema),
        figures=member.figures,
    )


async def register_member(
    manager: ControlPlaneManager,
    member: Member,
    model: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    figures: Callable[[], Figures] | None = None,
) -> Registration:
    """Make a member known to a Control Plane of its process; it is READY at once.

    A started Control Plane asks every engine's health over HTTP, also one of its own process, and
    takes it for dead when nothing answers. So a door is opened on the loopback interface that
    answers for `member.health_check()`.

    Args:
        manager: the Control Plane. Start it first: it never asks engines that were there before.
        member: the engine.
        model: the name that requests ask for.
        metadata: see `engine_metadata`.
        figures: how busy it is; copied to the live `EngineInfo` as its requests go on.

    Raises:
        ValueError: an engine of this id is registered.
    """
    door = HealthDoor(member)
    await door.open()

    def refresh() -> None:
        if figures is None:
            return
        now = figures()
        info.queue_length = now.queue_length
        info.kv_cache_usage_bytes = now.kv_cache_usage_bytes
        info.kv_cache_capacity_bytes = now.kv_cache_capacity_bytes

    try:
        info = manager.register_engine(
            member.engine_id,
            model,
            host=LOOPBACK,
            port=door.port,
            llm_engine=ProtocolEngine(member, refresh),
            metadata=dict(metadata or {}),
        )
    except BaseException:
        await door.close()
        raise
    refresh()
    return Registration(manager, info, door)


class HealthDoor:
    """Answers every HTTP request with 200 or 503, by a member's health check."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._server: asyncio.Server | None = None
        self.port = 0

    async def open(self) -> None:
        """Listen on a free port of the loopback interface."""
        self._server = await asyncio.start_server(self._answer, LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            await reader.readuntil(b"\r\n\r\n")
            status = "200 OK" if await self._member.health_check() else "503 Service Unavailable"
            head = f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            writer.write(head.encode())
            await writer.drain()
        writer.close()
