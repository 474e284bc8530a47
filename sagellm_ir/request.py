"""What a user asks for: a `Request`, its prompt in one of four forms, and how to sample."""

from typing import Union

from attrs import field, frozen, validators

__all__ = [
    "ChatPrompt",
    "Message",
    "Prompt",
    "Request",
    "RequestInfo",
    "Sampling",
    "TextPrompt",
    "TokenPrompt",
    "TracePrompt",
]


@frozen
class Message:
    """One chat message; `content` is plain text."""

    role: str
    content: str


@frozen
class TextPrompt:
    """Raw text: tokenised as it is, without a chat template."""

    text: str


@frozen
class ChatPrompt:
    """Chat messages: rendered with the model's chat template, then tokenised."""

    messages: tuple[Message, ...]
    started: str = ""
    """The start of the answer, if there is one: the model goes on with it."""


@frozen
class TokenPrompt:
    """Token ids, ready to run."""

    tokens: tuple[int, ...]


@frozen
class TracePrompt:
    """A prompt of a trace: its content is known only as one id per block of `block_size` tokens.

    Equal ids mean equal prefixes up to and including that block. The last id may stand for a
    block that is not full.
    """

    blocks: tuple[int, ...]
    length: int
    block_size: int


Prompt = Union[TextPrompt, ChatPrompt, TokenPrompt, TracePrompt]  # noqa: UP007  (3.10 attrs hints)


@frozen
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; a seed makes a draw repeatable."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings."""
    logprobs: int | None = None
    """Report how likely each token was, and so many of the likeliest in its place; None: neither."""


@frozen
class RequestInfo:
    """What is known of a request besides its prompt: shared by `Request` and the IR's declaration."""

    id: str
    max_new_tokens: int = field(
        default=128, validator=validators.gt(0), kw_only=True, metadata={"text": "max_new"}
    )
    arrival: float = field(default=0.0, kw_only=True)
    """Seconds since the start of the workload."""
    priority: int = field(default=0, kw_only=True)
    """Larger is served first."""
    deadline: float | None = field(default=None, kw_only=True)
    """Seconds since the start of the workload by which the answer should be complete."""
    adapter: str | None = field(default=None, kw_only=True)
    """LoRA adapter; KV is never shared between adapters."""
    tenant: str | None = field(default=None, kw_only=True)
    """KV is never shared between tenants."""
    session: str | None = field(default=None, kw_only=True)
    """Turns of one session run in arrival order."""


@frozen
class Request(RequestInfo):
    """One request as a user wrote it."""

    prompt: Prompt = field(kw_only=True)
    sampling: Sampling = field(default=Sampling(), kw_only=True)
    recorded_output: str | None = field(default=None, kw_only=True)
    """The answer a trace recorded, if any; never sent to the model."""
