"""Heartbeats go on whatever becomes of one, and are told to the fleet that is served now."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.control_plane.attach import ENGINES, Attachment, EngineRecord, Figures
from sagellm_ir.runtime.control_plane.fleet import Fleet
from sagellm_ir.runtime.control_plane.remote import RemoteEngine, engine_url
from tests.control_plane.gateways import BOTH, Gateway, engine, serve
from tests.control_plane.tiny_fleet import MODEL, eventually

BUSY = Figures(2, 1, 64, 128)
RECORD = EngineRecord("a", MODEL, "127.0.0.1", 9)


class Desk:
    """A gateway's management API that does what it is told, and counts."""

    def __init__(self) -> None:
        self.status, self.reports, self.looks, self.registered = 200, 0, 0, 0
        """`status` of reports: 405 is a gateway that has no route for them."""
        self.app = FastAPI()
        self.app.post(f"{ENGINES}/register")(self.register)
        self.app.get(ENGINES + "/{engine_id}")(self.look)
        self.app.patch(ENGINES + "/{engine_id}")(self.report)
        self.app.delete(ENGINES + "/{engine_id}")(self.leave)

    async def register(self) -> None:
        self.registered += 1

    async def look(self, engine_id: str) -> None:
        self.looks += 1
        if not self.registered:
            raise HTTPException(404)

    async def report(self, engine_id: str) -> None:
        self.reports += 1
        if self.status >= 400:
            raise HTTPException(self.status, "no")

    async def leave(self, engine_id: str) -> None:
        self.registered = 0


@asynccontextmanager
async def at_desk(
    figures: Callable[[], Figures] = Figures,
) -> AsyncIterator[tuple[Desk, Attachment]]:
    desk = Desk()
    async with serve(desk.app, desk) as at:
        attachment = Attachment(at.url, RECORD, figures=figures, interval=0.01)
        await attachment.open()
        try:
            yield desk, attachment
        finally:
            await attachment.close()


async def more(desk: Desk, name: str) -> None:
    """Wait until some number of the desk has grown by 2."""
    least = getattr(desk, name) + 2

    async def grown() -> bool:
        return bool(getattr(desk, name) >= least)

    await eventually(grown)


def test_figures_that_cannot_be_had_do_not_end_the_heartbeat(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = [ZeroDivisionError("no figures")]

    def figures() -> Figures:
        if broken:
            raise broken.pop()
        return BUSY

    async def test() -> None:
        async with at_desk(figures) as (desk, _):
            await more(desk, "reports")

    asyncio.run(test())
    assert "ZeroDivisionError: no figures" in caplog.text


def test_a_refused_heartbeat_is_said_once_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with at_desk() as (desk, _):
            await more(desk, "reports")
            desk.status = 500
            await more(desk, "reports")
            desk.status = 200
            await more(desk, "reports")

    with caplog.at_level(logging.WARNING, "sagellm_ir"):
        asyncio.run(test())
    said = [r.message for r in caplog.records if r.name.endswith("control_plane.attach")]
    assert len(said) == 2
    assert "did not take a heartbeat of engine 'a': 500" in said[0]
    assert "takes heartbeats again" in said[1]


def test_a_gateway_without_reports_is_asked_for_them_again_when_it_is_another() -> None:
    async def test() -> None:
        async with at_desk() as (desk, _):
            desk.status = 405
            await more(desk, "looks")
            reports = desk.reports
            await more(desk, "looks")
            assert desk.reports == reports
            desk.status, desk.registered = 200, 0  # another gateway, in its place
            await more(desk, "reports")
            assert desk.registered == 1

    asyncio.run(test())


@BOTH
def test_a_later_fleet_of_one_process_gets_its_own_reports(gateway: Callable[[], Any]) -> None:
    """SAGE's package has one application a process: an earlier fleet's route must not stay."""

    async def reported(at: Gateway) -> None:
        attachment = Attachment(at.url, RECORD, figures=lambda: BUSY, interval=0.01)
        await attachment.open()

        async def told() -> bool:
            fleet = at.fleet
            own = isinstance(fleet, Fleet)
            seen = fleet.find("a").figures if own else fleet.get_engine("a")
            return bool(seen.queue_length == BUSY.queue_length)

        await eventually(told)
        await attachment.close()

    async def test() -> None:
        for _ in range(2):
            async with gateway() as at:
                await reported(at)

    asyncio.run(test())


@BOTH
def test_an_engine_at_no_address_is_refused(gateway: Callable[[], Any]) -> None:
    async def test() -> None:
        async with gateway() as at:
            for host in ("a/b", "user@b", "[::", "a b"):
                with pytest.raises(SageIRError, match="refused engine 'a': 400"):
                    await Attachment(at.url, EngineRecord("a", MODEL, host, 9)).open()
            assert await at.engines() == {}

    asyncio.run(test())


def test_addresses() -> None:
    assert engine_url("::1", 9) == "http://[::1]:9"
    assert engine_url("Node-1.example", 80) == "http://Node-1.example:80"
    with pytest.raises(SageIRError, match="expected a name or an address, got ''"):
        engine_url("", 9)


@BOTH
def test_health_checks_go_on_after_one_that_breaks(
    gateway: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine in ERROR is READY again as soon as it answers."""
    answers: list[Any] = [False, ZeroDivisionError("not checked")]

    async def health_check(_: RemoteEngine) -> bool:
        answer = answers.pop(0) if answers else True
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    async def test() -> None:
        async with gateway() as at, engine("a") as (_, port):
            attachment = Attachment(at.url, EngineRecord("a", MODEL, "127.0.0.1", port))
            await attachment.open()
            monkeypatch.setattr(RemoteEngine, "health_check", health_check)
            if isinstance(at.fleet, Fleet):
                await at.come_to(a="ERROR")
            else:  # its own checks do not go through the member
                await at.fleet.suspect("a")
            await at.come_to(a="READY")
            await attachment.close()

    asyncio.run(test())
    assert "ZeroDivisionError: not checked" in caplog.text
