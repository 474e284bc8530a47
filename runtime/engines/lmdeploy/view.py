"""Requests of LMDeploy's scheduler under the names that plans use, and the `EngineView` of its state."""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from attrs import evolve
from lmdeploy.pytorch.messages import MessageStatus

from sagellm_ir.runtime.backend import CachedPrefix, EngineView, Finish, RequestView
from sagellm_ir.target import DEVICE, HOST

__all__ = ["ENDED", "WORKER", "NamedSequences", "Names", "News", "still"]

_UNNAMED = re.compile(r"session-(\d+)-\d+")
ENDED = frozenset((MessageStatus.STOPPED, MessageStatus.ABORTED, MessageStatus.TO_BE_MIGRATED))
"""States of a sequence that has no more to compute."""
WORKER = "w0"
"""One LMDeploy engine is one worker."""


class Names:
    """Request ids by session id and back. LMDeploy holds one sequence a session.

    Turns of sessions that were not named (they reached LMDeploy through its own server) are
    `session-N-P`: P is where in the conversation the turn's answer starts.
    """

    def __init__(self) -> None:
        self._request: dict[int, str] = {}
        self._session: dict[str, int] = {}

    def add(self, request: str, session: int) -> None:
        """Name a session, before its request reaches the scheduler."""
        self._request[session] = request
        self._session[request] = session

    def forget(self, request: str) -> None:
        """The request has ended."""
        session = self._session.pop(request, None)
        if session is not None:
            self._request.pop(session, None)

    def request(self, seq: Any) -> str:
        """The request id of a sequence."""
        session = seq.session_id
        return self._request.get(session, f"session-{session}-{seq.output_start_pos}")

    def session(self, request: str) -> int | None:
        """The session of a request, or None for a name that was never given."""
        if request in self._session:
            return self._session[request]
        match = _UNNAMED.fullmatch(request)
        return int(match.group(1)) if match else None

    def sequence(self, scheduler: Any, request: str) -> Any:
        """The sequence of a request; None while it has not reached the scheduler, or when it left."""
        session = scheduler.sessions.get(self.session(request))
        seq = None if session is None else next(iter(session.sequences.values()), None)
        return seq if seq is None or self.request(seq) == request else None


class _Live(RequestView):
    """A `RequestView` that reads its sequence when it is asked: one for each request, not for each tick."""

    __slots__ = ("seq", "start")
    seq: Any
    start: int

    def __init__(self, request: str, seq: Any) -> None:
        for name, value in (("id", request), ("seq", seq), ("start", seq.output_start_pos)):
            object.__setattr__(self, name, value)

    @property
    def prompt_len(self) -> int:
        return int(self.seq.num_all_ids - self.seq.num_new_tokens)

    @property
    def computed(self) -> int:
        return int(self.seq.num_history_ids)

    @property
    def generated(self) -> int:
        return int(self.seq.num_new_tokens)

    @property
    def max_new_tokens(self) -> int:
        return int(self.seq.sampling_param.max_new_tokens)

    @property
    def finish(self) -> Finish | None:
        return "stop" if self.seq.status is MessageStatus.STOPPED else None


def still(view: EngineView) -> EngineView:
    """A view to keep: its requests as they are now."""

    def of(part: tuple[RequestView, ...]) -> tuple[RequestView, ...]:
        return tuple(
            RequestView(r.id, r.prompt_len, r.computed, r.generated, r.max_new_tokens, r.finish)
            for r in part
        )

    return EngineView(of(view.waiting), of(view.running), of(view.finished), view.cached, view.free)


class _Now(EngineView):
    """What a source is asked with: looked up when it is read, so it holds until the next step."""

    def __init__(self, requests: "NamedSequences", in_flight: bool) -> None:
        object.__setattr__(self, "requests", requests)
        object.__setattr__(self, "in_flight", in_flight)

    requests: "NamedSequences"
    in_flight: bool

    @cached_property
    def _parts(self) -> tuple[tuple[RequestView, ...], ...]:
        waiting, running, finished = [], [], []
        for seen in self.requests.live.values():
            status = seen.seq.status
            if status in ENDED:
                finished.append(seen)
            elif status is MessageStatus.WAITING and seen.seq.num_history_ids == 0:
                waiting.append(seen)
            elif self.in_flight or status is not MessageStatus.LOCKED:
                running.append(seen)
        waiting.sort(key=lambda seen: float(seen.seq.arrive_time))
        return tuple(waiting), tuple(running), tuple(finished)

    @property
    def waiting(self) -> tuple[RequestView, ...]:
        return self._parts[0]

    @property
    def running(self) -> tuple[RequestView, ...]:
        return self._parts[1]

    @property
    def finished(self) -> tuple[RequestView, ...]:
        return self._parts[2]

    @property
    def cached(self) -> tuple[CachedPrefix, ...]:
        return ()

    @property
    def free(self) -> dict[tuple[str, str], int]:
        return self.requests.free()


class News:
    """What has come and gone since its reader asked last."""

    def __init__(self) -> None:
        self.come: list[_Live] = []
        self.gone: list[_Live] = []

    def take(self) -> tuple[list[_Live], list[_Live]]:
        """What has come, and what has gone."""
        taken = self.come, self.gone
        self.come, self.gone = [], []
        return taken


class NamedSequences:
    """The sequences of a scheduler under the names of their requests."""

    def __init__(self, scheduler: Any, names: Names) -> None:
        self.scheduler, self.names = scheduler, names
        self._followers: list[News] = []
        self.live: dict[int, _Live] = {}
        """By sequence id, as of the last `refresh`."""
        self.found: dict[str, Any] = {}
        """Sequences by request, as of the last `refresh`."""
        self._mark: tuple[int, int | None] = (0, None)
        """How many sequences there were at the last `refresh`, and the last of them."""
        self._queue: tuple[int, ...] = ()
        """Which sequences waited then, and where the answer of the last one starts."""

    def follow(self) -> News:
        """News from here on, for one more reader."""
        self._followers.append(News())
        return self._followers[-1]

    def refresh(self) -> None:
        """Look what has come and what has gone; costs as much as that, and as what waits if other
        sequences wait than before."""
        manager = self.scheduler.seq_manager
        all_now, live = manager._seq_map, self.live
        gone, new = list[_Live](), list[int]()
        # Sequences are numbered as they come: a newcomer is the last one.
        mark = len(all_now), next(reversed(all_now), None)
        if mark != self._mark:
            self._mark = mark
            gone += [live.pop(number) for number in live.keys() - all_now.keys()]
            new += sorted(all_now.keys() - live.keys())
        turns = self._turns()
        gone += map(live.pop, turns)
        new += turns
        if not gone and not new:
            return
        for seen in gone:
            self.found.pop(seen.id, None)
        come = [_Live(self.names.request(all_now[number]), all_now[number]) for number in new]
        for seen in come:
            live[seen.seq.seq_id] = seen
            self.found[seen.id] = seen.seq
        for news in self._followers:
            news.come += come
            news.gone += gone

    def _turns(self) -> list[int]:
        """Sequences that wait with another turn than before."""
        waiting = self.scheduler.seq_manager.get_sequences(MessageStatus.WAITING)
        # What comes to wait stands last.
        last = next(reversed(waiting.values()), None)
        queue = *waiting, -1 if last is None else last.output_start_pos
        if queue == self._queue:
            return []
        self._queue = queue
        return [
            number
            for number, seq in waiting.items()
            if (seen := self.live.get(number)) is not None and seen.start != seq.output_start_pos
        ]

    def snapshot(self) -> EngineView:
        """What the engine reports, all of it, to keep."""
        return evolve(still(self.view()), cached=tuple(self._cached()))

    def view(self, in_flight: bool = False) -> EngineView:
        """What a source is asked with.

        Its requests read their sequences when they are asked, so it holds until the next step; and
        it leaves out the cached blocks.

        Args:
            in_flight: also sequences in flight, as they were before. No step can name them yet.
        """
        return _Now(self, in_flight)

    def free(self) -> dict[tuple[str, str], int]:
        """Free blocks by worker and tier."""
        manager = self.scheduler.block_manager
        return {
            (WORKER, DEVICE): int(manager.get_num_free_gpu_blocks()),
            (WORKER, HOST): int(manager.get_num_free_cpu_blocks()),
        }

    def _cached(self) -> Iterator[CachedPrefix]:
        for seen in self.live.values():
            full = seen.seq.num_history_ids // seen.seq.block_size
            if full and seen.seq.status is not MessageStatus.LOCKED:
                table = seen.seq.logical_blocks.get_real_blocks()[:full].tolist()
                yield CachedPrefix(seen.id, DEVICE, WORKER, tuple(table))
