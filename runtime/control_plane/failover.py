"""One answer from a fleet: when an engine fails in the middle of it, another goes on.

The text that a client sees is made exactly once: the next engine continues from the prompt and
what was already sent, and nothing is sent twice.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

from sagellm_ir.request import Request
from sagellm_ir.runtime.control_plane.member import NOTHING, EngineLost, Member, Piece, SoFar

__all__ = ["Release", "Take", "relay"]

Take = Callable[[frozenset[str]], Awaitable[Member]]
"""Chooses an engine that is none of these; raises `EngineLost` when there is none."""
Release = Callable[[str, SoFar, bool], None]
"""Told when an engine is done with the request: its id, the answer so far, whether it was lost."""
PATIENCE = 10.0
"""Seconds without a piece after which an engine is asked whether it is still there."""


async def relay(
    request: Request, take: Take, release: Release, *, patience: float = PATIENCE
) -> AsyncGenerator[Piece, None]:
    """The pieces of an answer, from as many engines as it takes.

    Raises:
        EngineLost: no engine is left that could go on.
        SageIRError: the request is wrong.
    """
    so_far, failed = NOTHING, frozenset[str]()
    reasons: list[EngineLost] = []
    while True:
        member = await _next_engine(take, failed, reasons)
        lost = False
        try:
            pieces = _watched(member, request, so_far, patience)
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    so_far = so_far.plus(piece)
                    yield piece
                    if piece.finish is not None:
                        return
            raise EngineLost(f"engine {member.engine_id!r} ended without finishing")
        except EngineLost as error:
            lost = True
            reasons.append(error)
            failed |= {member.engine_id}
        finally:
            release(member.engine_id, so_far, lost)


async def _next_engine(take: Take, failed: frozenset[str], reasons: list[EngineLost]) -> Member:
    try:
        return await take(failed)
    except EngineLost as error:
        # The last engine's own reason says more than that there is none left.
        raise (reasons[-1] if reasons else error) from None


async def _watched(
    member: Member, request: Request, so_far: SoFar, patience: float
) -> AsyncGenerator[Piece, None]:
    """A member's pieces; lost also when it hangs and its health check fails."""
    pieces = member.stream(request, so_far)
    upcoming: asyncio.Future[Piece] | None = None
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(pieces))
            while not (await asyncio.wait({upcoming}, timeout=patience))[0]:
                if not await member.health_check():
                    raise EngineLost(f"engine {member.engine_id!r} hangs")
            try:
                yield upcoming.result()
            except StopAsyncIteration:
                return
    finally:
        # In a task of its own, which is not cancelled: who cancels this one may do so again and again
        # (anyio's scopes do), and a connection that is half closed keeps its engine at work.
        await asyncio.wait({asyncio.ensure_future(_close(pieces, upcoming))})


async def _close(
    pieces: AsyncGenerator[Piece, None], upcoming: "asyncio.Future[Piece] | None"
) -> None:
    """End a stream whose next piece may be on its way."""
    if upcoming is not None and not upcoming.done():
        upcoming.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, EngineLost):
            await upcoming
    await pieces.aclose()
