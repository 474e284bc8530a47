"""What an engine is to the rest of sagellm-ir, and what it reports. Imports no engine and no torch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol, runtime_checkable

from attrs import field, frozen

from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.protocols import CapabilityDescriptor

__all__ = [
    "CachedPrefix",
    "EngineStats",
    "EngineView",
    "Finish",
    "InferenceBackend",
    "Likelihood",
    "PlanSource",
    "RequestView",
    "Synchronous",
    "TokenEvent",
]

Finish = Literal["stop", "length", "abort"]
"""Why an answer ended: end token or stop string, the planned number of tokens, or its user."""


@frozen
class Likelihood:
    """How likely a token was: natural logarithms, of the model's own distribution."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens of that place and theirs, likeliest first."""


@frozen
class TokenEvent:
    """One token of an answer, or its end."""

    request: str
    token: int | None
    """None when the request ended without a new token (abort)."""
    text: str = ""
    """The text that became certain with this token: empty while a character or a possible stop
    string is still incomplete, or when the model has no tokenizer."""
    index: int = 0
    """Place of the token in the answer, from 0."""
    finish: Finish | None = None
    likelihood: Likelihood | None = None
    """When the request's `Sampling.logprobs` asks for it."""


@frozen
class RequestView:
    """How far a request has come."""

    id: str
    prompt_len: int
    computed: int
    """Tokens that a forward of this request has run so far (or could skip: its last row's end)."""
    generated: int
    """Tokens of its answer, those of steps in flight included."""
    max_new_tokens: int
    finish: Finish | None = None
    pending: int = 0
    """Of `generated`, those of steps in flight."""


@frozen
class CachedPrefix:
    """Blocks of a tier that hold the KV of a request's first tokens and have not been freed."""

    request: str
    tier: str
    worker: str
    blocks: tuple[int, ...]
    """In order of the request's blocks, from its first."""


@frozen
class EngineView:
    """What an engine reports before each step."""

    waiting: tuple[RequestView, ...] = ()
    """Submitted, nothing computed yet; in order of arrival."""
    running: tuple[RequestView, ...] = ()
    finished: tuple[RequestView, ...] = ()
    """Ended and not yet released."""
    cached: tuple[CachedPrefix, ...] = ()
    free: Mapping[tuple[str, str], int] = field(factory=dict)
    """Blocks that nothing holds, by (worker, tier)."""


@frozen
class EngineStats:
    """Counters since the engine was made."""

    steps: int = 0
    forwards: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    generated: int = 0
    moved_blocks: int = 0
    forward_seconds: float = 0.0
    move_seconds: float = 0.0


@runtime_checkable
class PlanSource(Protocol):
    """Where steps come from: a finished plan's cursor, or the online planner."""

    def next_step(self, view: EngineView) -> PlanStep | None:
        """The next step for an engine in this state, or None when there is nothing left to do."""
        ...


@runtime_checkable
class InferenceBackend(Protocol):
    """An engine that runs plan steps. It holds no scheduling policy."""

    @property
    def capability(self) -> CapabilityDescriptor:
        """What it can run."""
        ...

    def submit(self, request: PlanRequest, sampling: Sampling = ...) -> None:
        """Make a request known. Steps may name it from now on."""
        ...

    @property
    def depth(self) -> int:
        """Steps in flight, at most: with 2, a step may begin while the one before it runs."""
        ...

    def begin(self, step: PlanStep) -> None:
        """Begin a step. It runs behind those in flight, and may use what they leave free."""
        ...

    def take(self) -> list[TokenEvent]:
        """Wait for the oldest step in flight; its tokens, in the order they were made. Those of
        requests that have ended meanwhile are left out."""
        ...

    def step(self, step: PlanStep) -> list[TokenEvent]:
        """Run one step while none is in flight: `begin`, and `take`."""
        ...

    def stream(self, source: PlanSource) -> Iterator[TokenEvent]:
        """Run the steps of a source, token by token, until it has none left."""
        ...

    def view(self) -> EngineView:
        """The state that the next step is chosen for."""
        ...

    def abort(self, request: str) -> None:
        """End a request. Its rows are skipped from now on; its blocks stay as the plan says."""
        ...

    def release(self, request: str) -> None:
        """Forget a request that has ended; steps in flight may still name it."""
        ...

    def stats(self) -> EngineStats:
        """Counters since the engine was made."""
        ...


class Synchronous(ABC):
    """What an `InferenceBackend` needs beside a `step` that returns when all of it has run."""

    depth = 1
    _ran: list[TokenEvent] | None = None

    @abstractmethod
    def step(self, step: PlanStep) -> list[TokenEvent]:
        """See `InferenceBackend`."""

    def begin(self, step: PlanStep) -> None:
        """Run the step."""
        self._ran = self.step(step)

    def take(self) -> list[TokenEvent]:
        """What it made."""
        made, self._ran = self._ran, None
        assert made is not None, "no step is in flight"
        return made
