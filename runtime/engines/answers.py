"""What `SageLLMEngine` gives back: responses, stream events, and the reasons it can refuse for."""

from attrs import field, frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.backend import Finish, Likelihood
from sagellm_ir.runtime.engines.metrics import Metrics

__all__ = [
    "EngineBusy",
    "EngineDraining",
    "EngineFailed",
    "RequestAborted",
    "Response",
    "StreamDelta",
    "StreamEnd",
    "StreamEvent",
    "StreamStart",
]


@frozen
class Response:
    """A whole answer."""

    request_id: str
    text: str
    """Empty when the model has no tokenizer."""
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were not computed for this request: another one or the cache had them."""
    finish: Finish
    metrics: Metrics = field(factory=Metrics)
    likelihoods: tuple[Likelihood, ...] = ()
    """Of each token, when `Sampling.logprobs` asks for them."""


@frozen
class StreamStart:
    """The request is accepted and waits for its first token."""

    request_id: str
    engine_id: str
    prompt_tokens: int


@frozen
class StreamDelta:
    """One more token."""

    request_id: str
    token: int
    text: str
    """May be empty: half a character, or the possible start of a stop string, is held back."""
    index: int
    """Place of the token in the answer, from 0."""
    likelihood: Likelihood | None = None
    """When `Sampling.logprobs` asks for it."""


@frozen
class StreamEnd:
    """The answer is complete."""

    request_id: str
    response: Response


StreamEvent = StreamStart | StreamDelta | StreamEnd


class EngineBusy(SageIRError):
    """Too many requests wait already; `retry_after` seconds from now there may be room."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        help_ = f"try again in {retry_after:.0f} s"
        super().__init__(Diagnostic(f"{waiting} requests are waiting already", help=help_))
        self.retry_after = retry_after


class EngineDraining(SageIRError):
    """The engine finishes what it has and takes nothing new."""

    def __init__(self) -> None:
        message = "the engine is shutting down and takes no new requests"
        super().__init__(Diagnostic(message, help="ask another engine"))


class EngineFailed(SageIRError):
    """The engine or the planner broke. Nothing runs on it any more."""

    def __init__(self, engine_id: str) -> None:
        super().__init__(
            Diagnostic(f"engine {engine_id!r} failed", help="its log says why; start it again")
        )


class RequestAborted(SageIRError):
    """Somebody else ended the request: an operator, or a program in the engine's process."""

    def __init__(self, request_id: str) -> None:
        super().__init__(Diagnostic(f"request {request_id!r} was aborted"))
