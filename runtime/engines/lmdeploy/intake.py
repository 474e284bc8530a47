"""`Intake`: requests of a burst are taken in beside forwards, not all of them before the first.

Taking in a prompt costs as much as it is long, and one decision for many is dear; so the first forward
starts with those that fill it, and the next waits for the others as long as it has room for them.
"""

import asyncio
from typing import Any

from lmdeploy.pytorch.messages import MessageStatus

from sagellm_ir.runtime.backend import PlanSource
from sagellm_ir.runtime.engines.lmdeploy.flight import Flight
from sagellm_ir.runtime.engines.lmdeploy.prefixes import Prefixes

__all__ = ["Intake"]

_LAUNCH, _TURNS = 2, 32
"""Turns of the event loop until a forward that was given to the engine is launched; and until what has
come is taken in, at most."""


class Intake:
    """When an engine's loop goes on though requests wait to be taken in, and when it waits for them.

    Args:
        engine: LMDeploy's, patched: it takes in one request at a time.
        prefixes: what prompts have in common.
        flight: the step in flight.
        source: of steps; its `has_space` says whether the next one has room for more.
    """

    def __init__(self, engine: Any, prefixes: Prefixes, flight: Flight, source: PlanSource) -> None:
        self._requests, self._scheduler = engine.req_manager, engine.scheduler
        self._prefixes, self._flight = prefixes, flight
        self._has_space = getattr(source, "has_space", None)
        self._tokens = 0
        """To compute, of what has come since the last step."""

    def began(self) -> None:
        """A step was given to the engine."""
        self._tokens = 0

    def has_work(self) -> bool:
        """Whether what has come since the last step fills a forward; asked after each request that comes."""
        waiting = self._scheduler.seq_manager.get_sequences(MessageStatus.WAITING)
        newest = next(reversed(waiting.values()), None)
        if newest is not None:
            self._prefixes.read([newest])
            known = max(self._prefixes.common(newest), newest._num_history_ids)
            self._tokens += len(newest.history_cache) - known
        return self._is_full

    @property
    def _is_full(self) -> bool:
        return self._tokens >= int(self._scheduler.cache_config.max_prefill_token_num)

    async def gather(self) -> None:
        """Before the step behind a prefill in flight is asked for: let that one be launched, and requests
        that have come be taken in, as long as there is room for them."""
        if self._flight.decodes:
            return
        for _ in range(_LAUNCH):
            await asyncio.sleep(0)
        if self._has_space is None or not self._has_space():
            return
        for _ in range(_TURNS):
            if self._is_full or not self._requests.has_requests():
                break
            await asyncio.sleep(0)
