"""`EngineLoop`: the thread that owns a backend and its planner."""

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from itertools import count

from attrs import evolve

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import ExecutionPlan, PlanRequest, PlanStep
from sagellm_ir.runtime.backend import InferenceBackend, TokenEvent
from sagellm_ir.runtime.engines.answers import EngineBusy, EngineDraining, EngineFailed
from sagellm_ir.runtime.engines.metrics import Meter, Timing
from sagellm_ir.runtime.engines.tickets import Ended, News, Ticket, send
from sagellm_ir.runtime.planner import OnlinePlanner

__all__ = ["EngineLoop"]

logger = logging.getLogger(__name__)


class EngineLoop:
    """Takes requests from any thread, runs planned steps on its own, sends tokens to their homes.

    Whatever the backend or the planner raises while running ends the loop: every request hears
    `EngineFailed`, and so does every later `submit`. What is wrong with one request is told to
    that request only.
    """

    def __init__(
        self,
        engine_id: str,
        backend: InferenceBackend,
        planner: OnlinePlanner,
        meter: Meter,
        max_waiting: int,
    ) -> None:
        self._id, self._max_waiting = engine_id, max_waiting
        self._backend, self._planner, self._meter = backend, planner, meter
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        """New tickets; None wakes the thread up."""
        self._lock = threading.Lock()
        """Guards `_tickets`, `_names`, `_waiting`, `_refusal`."""
        self._names: set[str] = set()
        """Names that backend or planner may know."""
        self._numbers = count(1)
        self._tickets: dict[str, Ticket] = {}
        self._waiting = 0
        self._refusal: Callable[[], SageIRError] | None = None
        """Makes the reason why nothing is taken any more."""
        self._stopping = False
        self._known: set[str] = set()
        """Names that the backend knows."""
        self._ended: list[str] = []
        """Names to release, once the planner has seen their end."""
        self._flight: deque[PlanStep] = deque()
        """Steps that have begun, and whose tokens have not been taken."""
        self._thread = threading.Thread(target=self._run, name=f"engine-{engine_id}", daemon=True)

    # From any thread.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Abort what runs, end the thread, and wait for it: at most the rest of a step."""
        self.close()
        self._stopping = True
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def close(self) -> None:
        """Take no new requests."""
        with self._lock:
            self._refusal = self._refusal or EngineDraining

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive()

    @property
    def closed(self) -> bool:
        """Whether new requests are refused."""
        return self._refusal is not None

    @property
    def unfinished(self) -> int:
        """Requests in the loop."""
        return len(self._tickets)

    @property
    def plan(self) -> ExecutionPlan | None:
        """What was compiled last."""
        return self._planner.plan

    @property
    def decoding(self) -> tuple[PlanRequest, ...]:
        """Requests whose answers are under way."""
        with self._lock:
            return tuple(ticket.request for ticket in self._tickets.values() if ticket.made)

    def submit(self, request: PlanRequest) -> Ticket:
        """Hand a request in, from a coroutine; its news arrive on the running event loop.

        Raises:
            EngineBusy, EngineDraining, EngineFailed: it cannot be taken now.
        """
        home = asyncio.get_running_loop()
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            if self._waiting >= self._max_waiting:
                raise EngineBusy(self._waiting, self._retry_after())
            named = evolve(request, id=self._name(request.id))
            timing = Timing(request.prompt_len, time.perf_counter())
            ticket = Ticket(request.id, named, asyncio.Queue(), home, timing)
            self._tickets[named.id] = ticket
            self._waiting += 1
        self._inbox.put(ticket)
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """Abort a request, if it has not ended."""
        ticket.abandoned = True
        self._inbox.put(None)

    def abort(self, request: str) -> bool:
        """Abort the requests of a user's id; whether there were any."""
        with self._lock:
            found = [t for t in self._tickets.values() if t.id == request]
        for ticket in found:
            self.abandon(ticket)
        return bool(found)

    def _name(self, request: str) -> str:
        """A name that nothing in the engine has; from now on it is taken."""
        name = request
        while name in self._names:
            name = f"{request}~{next(self._numbers)}"
        self._names.add(name)
        return name

    def _retry_after(self) -> float:
        """Seconds until about half of those who wait have started, by the latest first tokens."""
        return min(30.0, max(1.0, self._meter.metrics().ttft_ms / 2e3))

    # From here on: the thread.

    def _run(self) -> None:
        try:
            idle = True
            while self._take(wait=idle):
                idle = not self._tick()
            self._land()
            self._finish(EngineDraining)
        except Exception:
            logger.exception("engine %s failed", self._id)
            self._finish(partial(EngineFailed, self._id))

    def _take(self, wait: bool) -> bool:
        """Take in what has come; False: stop."""
        while True:
            try:
                ticket = self._inbox.get(block=wait)
            except queue.Empty:
                break
            wait = False
            if ticket is not None and not ticket.abandoned:
                self._accept(ticket)
        with self._lock:
            left = [ticket for ticket in self._tickets.values() if ticket.abandoned]
        for ticket in left:
            if (name := ticket.request.id) in self._known:
                self._backend.abort(name)
            send(ticket.home, [(ticket, self._forget(ticket, "aborted"))])
        return not self._stopping

    def _accept(self, ticket: Ticket) -> None:
        """Make a request known to backend and planner, or tell it why not."""
        request = ticket.request
        try:
            self._backend.submit(request, request.sampling)
            self._known.add(request.id)
            self._planner.submit(request)
        except SageIRError as error:
            self._fail(ticket, error)
        except Exception:
            logger.exception("engine %s could not take request %s", self._id, request.id)
            self._fail(ticket, SageIRError(Diagnostic("the request cannot be run")))

    def _tick(self) -> bool:
        """Begin the next step, and wait for the oldest in flight where there is no next one or no
        room for it; False when there is neither."""
        view = self._backend.view()
        self._meter.look(view, self._waiting, len(self._tickets))
        step = self._planner.next_step(view)
        self._release()
        if step is not None:
            self._begin(step)
        elif not self._flight:
            return False
        if step is None or len(self._flight) == self._backend.depth:
            self._take_tokens()
        return True

    def _begin(self, step: PlanStep) -> None:
        self._schedule(step)
        self._backend.begin(step)
        self._flight.append(step)
        self._meter.began(step, self._planner.epochs, self._planner.evicted)

    def _take_tokens(self) -> None:
        """Wait for the oldest step in flight, and deliver its tokens."""
        made = [event for event in self._backend.take() if event.token is not None]
        self._flight.popleft()
        self._meter.took(len(made), self._backend.stats())
        self._deliver(made)

    def _land(self) -> None:
        """Leave no step in flight; nobody hears its tokens."""
        while self._flight:
            self._backend.take()
            self._flight.popleft()

    def _release(self) -> None:
        """Forget what has ended, now that the planner has seen its end."""
        for name in self._ended:
            self._backend.release(name)
        self._known.difference_update(self._ended)
        with self._lock:
            self._names.difference_update(self._ended)
        self._ended.clear()

    def _schedule(self, step: PlanStep) -> None:
        """Note the requests that a step runs for the first time."""
        now = time.perf_counter()
        for chunk in step.prefill:
            ticket = self._tickets.get(chunk.request)
            if ticket is not None and ticket.timing.scheduled is None:
                ticket.timing.scheduled, ticket.timing.cached = now, chunk.start
                with self._lock:
                    self._waiting -= 1
                self._meter.started(ticket.timing)

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Send tokens home: one wake-up an event loop, not one a token."""
        now = time.perf_counter()
        homes: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, News]]] = defaultdict(list)
        for event in events:
            if (ticket := self._tickets.get(event.request)) is None:
                continue  # aborted
            ticket.timing.token(now)
            homes[ticket.home].append((ticket, event))
            assert event.token is not None
            ticket.made.append(event.token)
            if event.finish:
                # Told here, with its answer: a next turn of a conversation finds the answer's KV.
                self._planner.end(event.request, [*(ticket.request.tokens or ()), *ticket.made])
                homes[ticket.home].append((ticket, self._forget(ticket, "finished")))
        for home, news in homes.items():
            send(home, news)

    def _fail(self, ticket: Ticket, error: SageIRError) -> None:
        """End a request with an error."""
        self._forget(ticket, "failed")
        send(ticket.home, [(ticket, error)])

    def _forget(self, ticket: Ticket, outcome: str) -> Ended:
        """A request leaves the loop; backend and planner still have to forget it."""
        name = ticket.request.id
        with self._lock:
            del self._tickets[name]
            if ticket.timing.scheduled is None:
                self._waiting -= 1
            if name not in self._known:
                self._names.discard(name)
        if name in self._known:
            self._ended.append(name)
        return Ended(ticket.timing.cached, self._meter.ended(ticket.timing, outcome))

    def _finish(self, refusal: Callable[[], SageIRError]) -> None:
        """Take nothing any more, and tell everybody who still waits."""
        with self._lock:
            self._refusal = refusal
            waiting = list(self._tickets.values())
        for ticket in waiting:
            self._fail(ticket, refusal())
