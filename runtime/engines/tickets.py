"""What requests in an `EngineLoop` hear, and where."""

import asyncio

from attrs import define, field, frozen

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import PlanRequest
from sagellm_ir.runtime.backend import TokenEvent
from sagellm_ir.runtime.engines.metrics import Metrics, Timing

__all__ = ["Ended", "News", "Ticket", "send"]


@frozen
class Ended:
    """The last news of a request."""

    cached_tokens: int
    metrics: Metrics


News = TokenEvent | Ended | SageIRError
"""What a request hears: its tokens, then how it ended or why it failed."""


@define(eq=False)
class Ticket:
    """A request in the loop, and where its news go."""

    id: str
    """As its user calls it."""
    request: PlanRequest
    """Its id is `id`, or a name made from it while the engine still knows another request of `id`."""
    news: "asyncio.Queue[News]"
    home: asyncio.AbstractEventLoop
    """The event loop of `news`."""
    timing: Timing
    made: list[int] = field(factory=list)
    """The tokens of its answer so far."""
    abandoned: bool = False
    """Set from outside: nobody waits for it any more."""


def send(home: asyncio.AbstractEventLoop, news: list[tuple[Ticket, News]]) -> None:
    """Put news into the tickets of one event loop, in one wake-up."""

    def put() -> None:
        for ticket, item in news:
            ticket.news.put_nowait(item)

    try:
        home.call_soon_threadsafe(put)
    except RuntimeError:  # the event loop has closed: nobody is left to hear it
        for ticket, _ in news:
            ticket.abandoned = True
