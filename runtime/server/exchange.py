"""`Exchange`: one body's answers, for one reader or for several with the same request id."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from contextlib import aclosing
from typing import Protocol

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.request import Request
from sagellm_ir.runtime.engines.answers import RequestAborted, Response, StreamEnd, StreamEvent

__all__ = ["Answering", "Exchange", "Exchanges", "News"]

News = tuple[int, StreamEvent]
"""Which answer, and what happened to it."""


class Answering(Protocol):
    """What answers: `SageLLMEngine`, or a fleet of engines."""

    def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The answer's events; `StreamEnd` is the last."""
        ...


class Exchange:
    """Runs the requests of one body, and lets readers follow from the beginning at any time.

    When its last reader leaves before the end, the requests are aborted.

    Args:
        engine: what answers.
        requests: one for each answer.
        ended: called with each whole answer, once.
    """

    def __init__(
        self,
        engine: Answering,
        requests: Sequence[Request],
        ended: Callable[[Response], None],
    ) -> None:
        self.finished = 0.0
        """When it ended, by `time.monotonic`; 0: it has not."""
        self.failed = False
        """Whether it ended without all answers."""
        self._engine, self._ended = engine, ended
        self._news: list[News] = []
        self._error: SageIRError | None = None
        self._changed = asyncio.Event()
        self._readers = 0
        self._task = asyncio.create_task(self._run(requests))

    async def follow(self) -> AsyncGenerator[News, None]:
        """Everything that has happened and will, until all answers have ended.

        Raises:
            SageIRError: what the engine raised.
        """
        self._readers += 1
        try:
            at = 0
            while True:
                while at < len(self._news):
                    yield self._news[at]
                    at += 1
                if self._error is not None:
                    raise self._error
                if self.finished:
                    return
                await self._changed.wait()
        finally:
            self._readers -= 1
            if not self._readers and not self.finished:
                self.failed = True
                self._task.cancel()

    async def _run(self, requests: Sequence[Request]) -> None:
        tasks = [
            asyncio.create_task(self._answer(number, request))
            for number, request in enumerate(requests)
        ]
        try:
            await asyncio.gather(*tasks)
        except SageIRError as error:
            self._error = error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.failed = self.failed or self._error is not None
            self.finished = time.monotonic()
            self._wake()

    async def _answer(self, number: int, request: Request) -> None:
        async with aclosing(self._engine.stream(request)) as events:
            async for event in events:
                if isinstance(event, StreamEnd):
                    if event.response.finish == "abort":
                        raise RequestAborted(request.id)
                    self._ended(event.response)
                self._news.append((number, event))
                self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Exchanges:
    """Exchanges by the id that clients gave them: a repeated id joins instead of running twice.

    Control planes post a request again when the answer is lost. Ended exchanges are kept for
    `keep` seconds, the last `most` of them; failed ones are not.
    """

    def __init__(self, keep: float = 30.0, most: int = 256) -> None:
        self._keep, self._most = keep, most
        self._known: OrderedDict[Hashable, Exchange] = OrderedDict()

    def join(self, key: Hashable | None, start: Callable[[], Exchange]) -> Exchange:
        """The exchange of this key, started if there is none; None is nobody's key."""
        if key is None:
            return start()
        found = self.find(key)
        if found is None:
            found = self._known[key] = start()
            self._known.move_to_end(key)
        return found

    def find(self, key: Hashable | None) -> Exchange | None:
        """The exchange of this key, if it runs or has ended well a short time ago."""
        self._tidy()
        found = self._known.get(key) if key is not None else None
        return None if found is None or found.failed else found

    def _tidy(self) -> None:
        old = time.monotonic() - self._keep
        surplus = len(self._known) - self._most
        for key, exchange in list(self._known.items()):
            if exchange.failed or (exchange.finished and (surplus > 0 or exchange.finished < old)):
                del self._known[key]
                surplus -= 1
