"""`Fleet`: engines at hosts and ports, without SAGE's packages: what our own gateway holds.

With the packages, `FleetManager` is the same on top of the Control Plane's registry. States are the
Control Plane's words, as they go over the wire.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from attrs import asdict, define, evolve, field

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.request import Request
from sagellm_ir.runtime.control_plane.attach import EngineRecord, Figures
from sagellm_ir.runtime.control_plane.failover import relay
from sagellm_ir.runtime.control_plane.member import EngineLost, Member, Piece, SoFar
from sagellm_ir.runtime.control_plane.prefixes import prompt_blocks
from sagellm_ir.runtime.control_plane.remote import RemoteEngine, engine_url
from sagellm_ir.runtime.control_plane.routing import Need, Router

__all__ = ["REPORTED", "Fleet", "Place"]

STARTING, READY, DRAINING, ERROR = "STARTING", "READY", "DRAINING", "ERROR"
REPORTED = (READY, DRAINING, "STOPPED")
"""States that an engine may report of itself."""

logger = logging.getLogger(__name__)


@define(eq=False)
class Place:
    """An engine in the fleet; a router's `Candidate`."""

    record: EngineRecord
    member: RemoteEngine
    state: str = STARTING
    active_requests: int = 0
    """Counted here."""
    figures: Figures = field(factory=Figures)
    """As the engine last reported them."""
    failures: int = 0
    """Health checks that failed in a row."""
    metadata: dict[str, Any] = field(factory=dict)

    @property
    def engine_id(self) -> str:
        """Its name."""
        return self.record.engine_id

    @property
    def queue_length(self) -> int:
        """Requests that wait there."""
        return self.figures.queue_length

    def describe(self) -> dict[str, Any]:
        """For the management API: the Control Plane's names."""
        return {
            "engine_id": self.engine_id,
            "model_id": self.record.model,
            "host": self.record.host,
            "port": self.record.port,
            "state": self.state,
            "is_healthy": self.state in (READY, DRAINING),
            "engine_kind": self.record.kind,
            "metadata": self.metadata,
            **asdict(self.figures),
            "active_requests": self.active_requests,
        }


class Fleet:
    """Engines, their health, and answers from them.

    Args:
        router: which engine a request goes to.
        interval: seconds between health checks.
        most_failures: health checks that fail in a row before an engine is in ERROR.
    """

    def __init__(
        self, router: Router | None = None, *, interval: float = 10.0, most_failures: int = 3
    ) -> None:
        self.router = router or Router()
        self.places: dict[str, Place] = {}
        self._interval, self._most_failures = interval, most_failures
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to check health."""
        self._watch = asyncio.create_task(self._check_all())

    async def stop(self) -> None:
        """Check no more, and close the connections."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        for place in self.places.values():
            await place.member.close()

    def register(self, record: EngineRecord) -> Place:
        """Take an engine in. It is READY when its record says that it was seen healthy.

        Raises:
            SageIRError: an engine of this id is here, or its host is none.
        """
        if record.engine_id in self.places:
            raise SageIRError(Diagnostic(f"Engine {record.engine_id} already registered"))
        url = engine_url(record.host, record.port)
        member = RemoteEngine(record.engine_id, url, record.model)
        place = Place(record, member, metadata=dict(record.metadata))
        place.state = READY if record.metadata.get("pre_verified_healthy") else STARTING
        self.places[record.engine_id] = place
        return place

    def unregister(self, engine_id: str) -> None:
        """Take an engine out. Answers under way there go on to their end.

        Raises:
            SageIRError: there is no such engine.
        """
        self.find(engine_id)
        del self.places[engine_id]
        self.router.index.forget(engine_id)

    def find(self, engine_id: str) -> Place:
        """The engine of this id.

        Raises:
            SageIRError: there is none.
        """
        if (place := self.places.get(engine_id)) is None:
            message, help_ = f"Engine {engine_id} not found", suggest(engine_id, self.places)
            raise SageIRError(Diagnostic(message, help=help_))
        return place

    def report(self, engine_id: str, state: str, figures: Figures) -> None:
        """What an engine says of itself.

        Raises:
            SageIRError: there is no such engine.
        """
        place = self.find(engine_id)
        place.figures = figures
        if place.state != ERROR:  # the next health check decides whether it can be reached
            place.state = state

    def models(self) -> list[str]:
        """What can be asked."""
        ready = [place for place in self.places.values() if place.state == READY]
        return list(dict.fromkeys(place.record.model for place in ready))

    async def stream(
        self, request: Request, model: str, prefer: tuple[str, ...] = ()
    ) -> AsyncGenerator[Piece, None]:
        """An answer, from as many engines as it takes.

        Raises:
            EngineLost: no engine can give it, or go on with it.
            SageIRError: the request is wrong.
        """
        need = Need(tuple(prompt_blocks(request, model)), prefer)
        taken: dict[str, Place] = {}

        async def take(failed: frozenset[str]) -> Member:
            for engine in failed & self.places.keys():
                await self._check(self.places[engine], at_most=1)
            able = [p for p in self.places.values() if p.record.model == model and p.state == READY]
            found = self.router.choose(evolve(need, excluded=failed), able)
            if found is None:
                raise EngineLost(f"no engine is ready for model {model!r}")
            place, why = found
            logger.debug("%s goes to %s: %s", request.id, place.engine_id, why)
            taken[place.engine_id] = place
            place.active_requests += 1
            return place.member

        def release(engine: str, so_far: SoFar, lost: bool) -> None:
            place = taken[engine]  # which may have left the fleet since
            place.active_requests -= 1
            if not lost and self.places.get(engine) is place:
                self.router.index.add(engine, prompt_blocks(request, model, so_far.text))

        async with contextlib.aclosing(relay(request, take, release)) as pieces:
            async for piece in pieces:
                yield piece

    async def _check_all(self) -> None:
        while True:
            for place in list(self.places.values()):
                await self._try_check(place)
            await asyncio.sleep(self._interval)

    async def _try_check(self, place: Place) -> None:
        """Whatever becomes of it, the other engines are asked all the same."""
        try:
            await self._check(place, self._most_failures)
        except Exception:
            logger.exception("engine %s could not be checked", place.engine_id)

    async def _check(self, place: Place, at_most: int) -> None:
        """Ask one engine's health; in ERROR after so many failures, READY when it answers."""
        if await place.member.health_check():
            place.failures = 0
            if place.state in (STARTING, ERROR):
                place.state = READY
            return
        place.failures += 1
        if place.failures >= at_most and place.state != ERROR:
            logger.warning("engine %s does not answer", place.engine_id)
            place.state = ERROR
            self.router.index.forget(place.engine_id)
