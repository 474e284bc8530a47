"""Our requests and answers as the Control Plane's, and back. Needs `isagellm-protocol`.

The protocol's `Request` has no place for some of what we know; in process its `metadata` arrives
unchanged, so these keys of it are read:

    tenant, adapter, session   strings, as in `sagellm_ir.request.RequestInfo`
    priority                   "critical", "high", "normal", "low", "background", or 0 to 4
    deadline_ms                milliseconds from now by which the answer should be complete
    accelerator                a device kind, or "domestic"
"""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

from attrs import define, field
from sagellm_control import RequestPriority
from sagellm_protocol import (
    Error,
    ErrorCode,
    Metrics,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    Timestamps,
)
from sagellm_protocol import Request as ProtocolRequest
from sagellm_protocol import Response as ProtocolResponse

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.request import ChatPrompt, Message, Request, Sampling, TextPrompt
from sagellm_ir.runtime.control_plane.member import EngineLost, Piece, Usage

__all__ = ["Recorder", "error_of", "priority_of", "to_request"]

GREEDY = "greedy"


def to_request(request: ProtocolRequest) -> Request:
    """A protocol request as ours.

    Raises:
        SageIRError: a value of its metadata is wrong.
    """
    known = request.metadata or {}
    messages = tuple(Message(m.role, m.content) for m in request.messages or ())
    return Request(
        request.request_id,
        prompt=ChatPrompt(messages) if messages else TextPrompt(request.prompt),
        sampling=_sampling(request),
        max_new_tokens=request.max_tokens,
        # The protocol's smallest is the most urgent; ours is served first when it is largest.
        priority=RequestPriority.NORMAL.value - priority_of(known).value,
        tenant=_word(known, "tenant"),
        adapter=_word(known, "adapter"),
        session=_word(known, "session"),
    )


def priority_of(metadata: Mapping[str, Any]) -> RequestPriority:
    """The priority that a request's metadata names.

    Raises:
        SageIRError: there is no such priority.
    """
    given = metadata.get("priority", RequestPriority.NORMAL)
    try:
        if isinstance(given, str):
            return RequestPriority[given.upper()]
        return RequestPriority(given)
    except (KeyError, ValueError):
        names = [member.name.lower() for member in RequestPriority]
        message = f"metadata: no priority {given!r}"
        raise SageIRError(Diagnostic(message, help=suggest(str(given), names))) from None


def _word(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    if value is None or isinstance(value, str):
        return value
    raise SageIRError(Diagnostic(f"metadata: {key} must be a string, not {value!r}"))


def _sampling(request: ProtocolRequest) -> Sampling:
    """A request's own temperature and top_p come before those of its sampling parameters.

    Without either it is greedy, which is the protocol's default strategy.
    """
    given = request.sampling_params
    temperature, top_p = request.temperature, request.top_p
    if given is not None:
        if temperature is None:
            temperature = 0.0 if given.strategy.value == GREEDY else given.temperature
        top_p = given.top_p if top_p is None else top_p
    return Sampling(
        temperature=temperature or 0.0,
        top_p=1.0 if top_p is None else top_p,
        top_k=given.top_k if given else 0,
        seed=given.seed if given else None,
        stop=tuple(given.stop_sequences or ()) if given else (),
    )


def error_of(problem: SageIRError) -> Error:
    """What went wrong, in the protocol's words."""
    code = ErrorCode.INVALID_ARGUMENT
    if isinstance(problem, EngineLost):
        busy = problem.retry_after is not None
        code = ErrorCode.RESOURCE_EXHAUSTED if busy else ErrorCode.UNAVAILABLE
    return Error(code=code, message=str(problem), retryable=isinstance(problem, EngineLost))


@define
class Recorder:
    """Gathers one answer, and tells it as the protocol's response or events."""

    request: ProtocolRequest
    engine_id: str
    text: str = ""
    tokens: list[int] = field(factory=list)
    pieces: int = 0
    """Those with text or tokens."""
    finish: str = "error"
    usage: Usage | None = None
    began: float = field(factory=time.time)
    times: list[float] = field(factory=list)
    """When each piece came, in seconds since the epoch."""

    def add(self, piece: Piece) -> None:
        """One more piece of the answer."""
        self.text += piece.text
        self.tokens += piece.tokens
        if piece.text or piece.tokens:
            self.times.append(time.time())
        self.usage = piece.usage or self.usage
        if piece.finish is not None:
            self.finish = "stop" if piece.finish == "abort" else piece.finish

    def start(self) -> StreamEventStart:
        """The first event."""
        return StreamEventStart(**self._names)

    def delta(self, piece: Piece) -> StreamEventDelta:
        """A piece as an event."""
        return StreamEventDelta(
            **self._names, content=piece.text, content_tokens=list(piece.tokens)
        )

    def end(self, problem: SageIRError | None = None) -> StreamEventEnd:
        """The last event; `problem` is why the answer is not whole."""
        return StreamEventEnd(
            **self._names,
            prompt_tokens=self.usage.prompt_tokens if self.usage else None,
            content=self.text,
            output_tokens=self._output(),
            finish_reason="error" if problem else self.finish,
            metrics=self.metrics(),
            error=error_of(problem) if problem else None,
        )

    def response(self, problem: SageIRError | None = None) -> ProtocolResponse:
        """The whole answer; `problem` is why it is not."""
        end = self.end(problem)
        return ProtocolResponse(
            request_id=end.request_id,
            trace_id=end.trace_id,
            output_text=end.content,
            output_tokens=end.output_tokens,
            prompt_tokens=end.prompt_tokens,
            finish_reason=end.finish_reason,
            metrics=end.metrics,
            error=end.error,
        )

    def metrics(self) -> Metrics:
        """Times in milliseconds, as a client of the engine sees them."""
        now = time.time()
        first, last = (self.times[0], self.times[-1]) if self.times else (now, now)
        count = len(self._output())
        gap = (last - first) * 1e3 / (count - 1) if count > 1 else 0.0
        usage = self.usage
        return Metrics(
            ttft_ms=(first - self.began) * 1e3,
            tbt_ms=gap,
            tpot_ms=gap,
            throughput_tps=count / max(now - self.began, 1e-9),
            peak_mem_mb=_peak_mib(),
            error_rate=0.0,
            kv_used_tokens=usage.prompt_tokens + usage.completion_tokens if usage else 0,
            kv_used_bytes=usage.kv_bytes if usage else 0,
            prefix_hit_rate=usage.cached_tokens / usage.prompt_tokens
            if usage and usage.prompt_tokens
            else 0.0,
            prefill_ms=(first - self.began) * 1e3,
            decode_ms=(last - first) * 1e3,
            itl_list=[(b - a) * 1e3 for a, b in zip(self.times, self.times[1:], strict=False)],
            timestamps=Timestamps(
                queued_at=self.began, scheduled_at=self.began, executed_at=first, completed_at=now
            ),
        )

    @property
    def _names(self) -> dict[str, str]:
        return {
            "request_id": self.request.request_id,
            "trace_id": self.request.trace_id,
            "engine_id": self.engine_id,
        }

    def _output(self) -> list[int]:
        """Token ids; zeros, as many as were made, when the engine tells none (the Control Plane's
        own HTTP client does the same)."""
        if self.tokens or self.usage is None:
            return self.tokens
        return [0] * self.usage.completion_tokens


def _peak_mib() -> int:
    """Most memory this process ever held; `ru_maxrss` is in KiB, on macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)
