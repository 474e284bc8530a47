"""Requests of LMDeploy's scheduler under the names that plans use, and the `EngineView` of its state."""

import re
from collections.abc import Mapping
from typing import Any

from sagellm_ir.runtime.backend import CachedPrefix, EngineView, Finish, RequestView
from sagellm_ir.target import DEVICE, HOST

__all__ = ["ENDED", "WORKER", "Names", "sequences", "view_of"]

_UNNAMED = re.compile(r"session-(\d+)-\d+")
ENDED = ("STOPPED", "ABORTED", "TO_BE_MIGRATED")
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


def sequences(scheduler: Any, names: Names) -> dict[str, Any]:
    """All sequences of a scheduler by request id."""
    return {
        names.request(seq): seq
        for session in scheduler.sessions.values()
        for seq in session.sequences.values()
    }


def view_of(scheduler: Any, found: Mapping[str, Any]) -> EngineView:
    """What the engine reports; `found` are its `sequences`. Sequences in flight are left out: no step can name them yet."""
    waiting, running, finished, cached = [], [], [], []
    for request, seq in found.items():
        status = seq.status.name
        if status == "LOCKED":
            continue
        seen = _request_view(request, seq, "stop" if status == "STOPPED" else None)
        if status in ENDED:
            finished.append(seen)
        elif status == "WAITING" and seen.computed == 0:
            waiting.append((seq.arrive_time, seen))
        else:
            running.append(seen)
        full = seq.num_history_ids // seq.block_size
        if full:
            table = seq.logical_blocks.get_real_blocks()[:full].tolist()
            cached.append(CachedPrefix(request, DEVICE, WORKER, tuple(table)))
    manager = scheduler.block_manager
    free = {(WORKER, DEVICE): int(manager.get_num_free_gpu_blocks())}
    free[WORKER, HOST] = int(manager.get_num_free_cpu_blocks())
    in_order = tuple(seen for _, seen in sorted(waiting, key=lambda pair: pair[0]))
    return EngineView(in_order, tuple(running), tuple(finished), tuple(cached), free)


def _request_view(request: str, seq: Any, finish: Finish | None) -> RequestView:
    known = seq.num_all_ids
    return RequestView(
        id=request,
        prompt_len=int(known - seq.num_new_tokens),
        computed=int(seq.num_history_ids),
        generated=int(seq.num_new_tokens),
        max_new_tokens=int(seq.sampling_param.max_new_tokens),
        finish=finish,
    )
