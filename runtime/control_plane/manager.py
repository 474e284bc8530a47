"""`FleetManager`: the Control Plane's own manager, with our routing and with failover.

Registry, health, scheduling policies and book-keeping are those of `ControlPlaneManager`. What is
added: an engine is chosen by `Router`; engines at a host and port are asked through `RemoteEngine`,
which sends all of a request and posts it once; an answer whose engine fails goes on at another.
It goes wherever a `ControlPlaneManager` does, the real gateway too: `create_app(control_plane=...)`.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime
from typing import Any

from attrs import evolve
from sagellm_control import (
    ControlPlaneManager,
    EngineInfo,
    EngineState,
    LoadBalancer,
    PlacementDecision,
    RequestMetadata,
)
from sagellm_protocol import Request as ProtocolRequest
from sagellm_protocol import Response as ProtocolResponse

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.request import Request, TextPrompt
from sagellm_ir.runtime.control_plane.attach import Figures
from sagellm_ir.runtime.control_plane.failover import relay
from sagellm_ir.runtime.control_plane.in_process import ProtocolEngine
from sagellm_ir.runtime.control_plane.member import EngineLost, Member, Piece, SoFar
from sagellm_ir.runtime.control_plane.prefixes import prompt_blocks
from sagellm_ir.runtime.control_plane.protocol import Recorder, priority_of, to_request
from sagellm_ir.runtime.control_plane.remote import RemoteEngine, engine_url
from sagellm_ir.runtime.control_plane.routing import Need, Router, accelerators

__all__ = ["POLICIES", "FleetManager"]

POLICIES = ("fifo", "priority", "slo_aware", "adaptive", "lifetime_aware")
"""Scheduling policies that `ControlPlaneManager` loads and that leave the engine to a router. It
takes any other word for fifo. Grouping by prefix is the routing "longest_prefix"."""
NOBODY = "fleet"
"""The engine of an answer that no engine began."""

logger = logging.getLogger(__name__)


class FleetManager(ControlPlaneManager):  # type: ignore[misc]  # it comes without types
    """A `ControlPlaneManager` of a mixed fleet.

    Args:
        scheduling_policy: one of `POLICIES`.
        router: which engine a request goes to.
        health_check_interval_s: seconds between health checks, once it is started.
        options: others of `ControlPlaneManager`.

    Raises:
        SageIRError: there is no such policy.
    """

    def __init__(
        self,
        scheduling_policy: str = "fifo",
        router: Router | None = None,
        *,
        health_check_interval_s: float = 10.0,
        **options: Any,
    ) -> None:
        if scheduling_policy not in POLICIES:
            message = f"no scheduling policy is called {scheduling_policy!r}"
            help_ = suggest(scheduling_policy, POLICIES)
            raise SageIRError(Diagnostic(message, help=help_))
        super().__init__(
            scheduling_policy=scheduling_policy,
            health_check_interval_s=health_check_interval_s,
            **options,
        )
        self.router = router or Router()
        self.needs: dict[str, Need] = {}
        """Of the requests that are being scheduled, by id."""
        self.draining: set[str] = set()
        """Engines that take nothing new: a healthy engine's DRAINING is undone at its next check."""
        self._members: dict[str, Member] = {}
        self._interval = health_check_interval_s
        self._revival: asyncio.Task[None] | None = None

    def _get_load_balancer(self) -> LoadBalancer:
        """The manager's hook for who chooses the engine; its own takes four names only."""
        return _Balancer(self)

    async def start(self) -> None:
        """Begin to check health. Engines in ERROR that answer again become READY again."""
        await super().start()
        self._revival = asyncio.create_task(self._revive())

    async def stop(self) -> None:
        """Check health no more, and close the connections to the engines."""
        if self._revival is not None:
            self._revival.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._revival
        for member in self._members.values():
            if isinstance(member, RemoteEngine):
                await member.close()
        await super().stop()

    def register_engine(
        self,
        engine_id: str,
        model_id: str,
        host: str | None = None,
        port: int | None = None,
        engine_kind: str = "llm",
        engine: Any = None,
        llm_engine: Any = None,
        metadata: dict[str, Any] | None = None,
    ) -> EngineInfo:
        """As `ControlPlaneManager`; `llm_engine` is what `register` makes.

        Raises:
            ValueError: an engine of this id is registered, none is given, or its host is none.
            SageIRError: `llm_engine` is not a `ProtocolEngine`, so no answer could go on there.
        """
        metadata = metadata or {}
        if engine is not None or engine_kind == "embedding":
            return super().register_engine(
                engine_id, model_id, host, port, engine_kind, engine, None, metadata
            )
        remote = llm_engine is None
        if remote and host is not None and port is not None:
            llm_engine = ProtocolEngine(RemoteEngine(engine_id, _url(host, port), model_id))
        if not isinstance(llm_engine, ProtocolEngine | None):
            message = f"engine {engine_id!r} is a {type(llm_engine).__name__}, no ProtocolEngine"
            raise SageIRError(Diagnostic(message, help="use sagellm_ir's `register`"))
        info = super().register_engine(
            engine_id, model_id, host, port, engine_kind, None, llm_engine, metadata
        )
        if llm_engine is not None:
            self._members[engine_id] = llm_engine.member
        if remote:
            info.metadata.pop("in_process", None)
            if not metadata.get("pre_verified_healthy"):
                info.state = EngineState.STARTING
        return info

    def unregister_engine(self, engine_id: str) -> bool:
        """Take an engine out. Answers under way there go on to their end."""
        self.router.index.forget(engine_id)
        self.draining.discard(engine_id)
        self._members.pop(engine_id, None)
        found: bool = super().unregister_engine(engine_id)
        return found

    def report(self, engine_id: str, state: str, figures: Figures) -> None:
        """What an engine says of itself; it is what the Control Plane's own routings look at.

        Raises:
            SageIRError: there is no such engine.
        """
        if (info := self.get_engine(engine_id)) is None:
            raise SageIRError(Diagnostic(f"Engine {engine_id} not found"))
        (self.draining.discard if state == EngineState.READY.value else self.draining.add)(
            engine_id
        )
        if info.state not in (EngineState.ERROR, EngineState(state)):
            self.update_engine_state(engine_id, EngineState(state))
        info.last_heartbeat = datetime.now()
        info.queue_length = figures.queue_length
        info.kv_cache_usage_bytes = figures.kv_cache_usage_bytes
        info.kv_cache_capacity_bytes = figures.kv_cache_capacity_bytes

    async def execute_request(
        self, request: ProtocolRequest, timeout_s: float | None = None
    ) -> ProtocolResponse:
        """The whole answer; what goes wrong is in its `error`."""
        answer = _Answer(self, request)
        try:
            await asyncio.wait_for(answer.whole(), timeout_s)
        except SageIRError as problem:
            return answer.recorder.response(problem)
        except asyncio.TimeoutError:
            return answer.recorder.response(EngineLost(f"no answer within {timeout_s} s"))
        return answer.recorder.response()

    async def stream_request(self, request: ProtocolRequest) -> AsyncGenerator[Any, None]:
        """Start, deltas, end; what goes wrong is in the end's `error`."""
        answer = _Answer(self, request)
        problem: SageIRError | None = None
        yield answer.recorder.start()
        try:
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    if piece.text or piece.tokens:
                        yield answer.recorder.delta(piece)
        except SageIRError as error:
            problem = error
        yield answer.recorder.end(problem)

    async def place(self, request: ProtocolRequest, need: Need) -> Member:
        """Schedule a request, by the policy and the router.

        Raises:
            EngineLost: no engine can take it.
        """
        known = request.metadata or {}
        self.needs[request.request_id] = need
        try:
            decision = await self.schedule_request(
                request.request_id,
                request.trace_id,
                request.model,
                prompt=request.prompt,
                max_tokens=request.max_tokens,
                priority=priority_of(known),
                deadline_ms=known.get("deadline_ms"),
            )
        finally:
            self.needs.pop(request.request_id, None)
        if not decision.is_scheduled or decision.engine_id not in self._members:
            raise EngineLost(decision.reason)
        return self._members[decision.engine_id]

    async def suspect(self, engine_id: str) -> None:
        """An engine failed a request: when it fails its health check too, it is in ERROR."""
        member = self._members.get(engine_id)
        if member is not None and not await member.health_check():
            self.router.index.forget(engine_id)
            self.update_engine_state(engine_id, EngineState.ERROR)

    async def _revive(self) -> None:
        """`ControlPlaneManager` never asks an engine in ERROR again."""
        while True:
            await asyncio.sleep(self._interval)
            for info in self.list_engines(EngineState.ERROR):
                await self._try_revive(info)

    async def _try_revive(self, info: EngineInfo) -> None:
        """Whatever becomes of it, the other engines are asked all the same."""
        member = self._members.get(info.engine_id)
        try:
            if member is not None and await member.health_check():
                info.consecutive_failures = 0
                self.update_engine_state(info.engine_id, EngineState.READY)
        except Exception:
            logger.exception("engine %s could not be checked", info.engine_id)


class _Balancer(LoadBalancer):  # type: ignore[misc]  # it comes without types
    """Asks the fleet's router instead of one of the Control Plane's own."""

    def __init__(self, fleet: FleetManager) -> None:
        super().__init__()
        self._fleet = fleet

    def route(
        self, request: RequestMetadata, candidates: Sequence[EngineInfo]
    ) -> EngineInfo | None:
        """The engine for a request."""
        return self.route_with_decision(request, candidates)[0]

    def route_with_decision(
        self, request: RequestMetadata, candidates: Sequence[EngineInfo]
    ) -> tuple[EngineInfo | None, PlacementDecision | None]:
        """The engine for a request, and why."""
        fleet = self._fleet
        need = fleet.needs.get(request.request_id) or _need_of_prompt(request)
        able = [info for info in candidates if info.engine_id not in fleet.draining]
        if (found := fleet.router.choose(need, able)) is None:
            return None, None
        info, reason = found
        placed = PlacementDecision(
            engine_id=info.engine_id,
            strategy=fleet.router.routing,
            reason=reason,
            candidate_count=len(able),
            selected_engine_load=info.total_load,
        )
        return info, placed


def _url(host: str, port: int) -> str:
    """`engine_url`, with the error that callers of a Control Plane expect."""
    try:
        return engine_url(host, port)
    except SageIRError as error:
        raise ValueError(str(error)) from None


def _need_of_prompt(request: RequestMetadata) -> Need:
    """Of a request that came through `schedule_request`, where all that is known is its prompt."""
    prompt = Request(request.request_id, prompt=TextPrompt(request.prompt or ""))
    return Need(tuple(prompt_blocks(prompt, request.model_id)))


class _Answer:
    """One request's way through a fleet."""

    def __init__(self, fleet: FleetManager, request: ProtocolRequest) -> None:
        self.recorder = Recorder(request, NOBODY)
        self._fleet, self._request = fleet, request

    async def whole(self) -> None:
        """All pieces, recorded."""
        async for _ in self.pieces():
            pass

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces, recorded as they come."""
        fleet, request = self._fleet, self._request
        asked = to_request(request)
        wanted = (request.metadata or {}).get("accelerator", ())
        need = Need(tuple(prompt_blocks(asked, request.model)), accelerators(wanted))

        async def take(failed: frozenset[str]) -> Member:
            for engine in failed:
                await fleet.suspect(engine)
            member = await fleet.place(request, evolve(need, excluded=failed))
            self.recorder.engine_id = member.engine_id
            return member

        def release(engine: str, so_far: SoFar, lost: bool) -> None:
            fleet.complete_request(request.request_id, engine)
            if not lost:
                blocks = prompt_blocks(asked, request.model, so_far.text)
                fleet.router.index.add(engine, blocks)

        async with contextlib.aclosing(relay(asked, take, release)) as pieces:
            async for piece in pieces:
                self.recorder.add(piece)
                yield piece
