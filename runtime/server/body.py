"""`read_ask`: the body of a completion -> what it asks for, each field checked."""

import json
from typing import Any, Literal, NoReturn

from attrs import evolve, frozen

from sagellm_ir.diagnostics import suggest
from sagellm_ir.nodes import Location
from sagellm_ir.request import Prompt, Sampling
from sagellm_ir.requests.fields import Fields
from sagellm_ir.requests.known import HARMLESS, UNSUPPORTED, has_effect
from sagellm_ir.requests.prompts import read_prompts, read_sampling
from sagellm_ir.runtime.server.errors import ApiError

__all__ = ["Ask", "Kind", "read_ask", "read_json"]

Kind = Literal["chat", "completion"]

_MOST_ANSWERS = 128
"""Answers that one body may ask for."""
_MOST_STOPS = 16
_MOST_TOP = 20
"""Likeliest tokens that are reported, as at OpenAI."""
# fmt: off
_FIELDS = frozenset({
    "model", "messages", "prompt", "prompt_token_ids", "max_tokens", "max_completion_tokens", "n",
    "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "logprobs",
    "top_logprobs", "priority", "cache_salt",
    "add_generation_prompt", "continue_final_message",
})
# fmt: on
"""What a body may say; misspelt fields are compared with these."""


@frozen
class Ask:
    """One body."""

    model: str | None
    prompts: list[Prompt]
    answers: int
    """To each prompt."""
    sampling: Sampling
    max_new: int | None
    """None: as many as the server gives by itself."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with its usage."""
    priority: int
    salt: str | None
    """KV is shared only between bodies of one salt."""


class _Body(Fields):
    """The fields of a body; what is wrong with one becomes an answer of status 400."""

    def fail(self, name: str, message: str, help_: str = "") -> NoReturn:
        text = f"{self.prefix}{name}: {message}" + (f" ({help_})" if help_ else "")
        raise ApiError(400, text, "invalid_value", param=name)


def read_json(raw: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: it is none.
    """
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {why}", "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", "invalid_json")
    return value


def read_ask(kind: Kind, values: dict[str, Any]) -> Ask:
    """What a body asks for. What it leaves out is greedy: temperature 0.

    Raises:
        ApiError: a field is missing, wrong, unknown, or not supported.
    """
    body = _Body(values, Location("body", 1))
    wanted = "messages" if kind == "chat" else "prompt"
    if values.get(wanted) is None and (kind == "chat" or values.get("prompt_token_ids") is None):
        body.fail(wanted, "it is missing", "every request has one")
    prompts = read_prompts(body)
    sampling = evolve(read_sampling(body), logprobs=_logprobs(kind, body))
    if len(sampling.stop) > _MOST_STOPS:
        body.expected("stop", f"at most {_MOST_STOPS} texts", list(sampling.stop))
    answers = body.integer("n", default=1, least=1)
    if answers * len(prompts) > _MOST_ANSWERS:
        body.fail("n", f"expected at most {_MOST_ANSWERS} answers in all")
    stream = body.flag("stream")
    ask = Ask(
        model=body.text("model"),
        prompts=prompts,
        answers=answers,
        sampling=sampling,
        max_new=body.integer("max_completion_tokens", "max_tokens", least=1),
        stream=stream,
        include_usage=_include_usage(body, stream),
        priority=body.integer("priority", default=0),
        salt=body.text("cache_salt"),
    )
    _refuse(body)
    return ask


def _logprobs(kind: Kind, body: _Body) -> int | None:
    """How many likeliest tokens to report; None: not even the probability of the token itself."""
    if kind == "completion":
        count = body.integer("logprobs", least=0)
        name = "logprobs"
    else:
        wanted, name = body.flag("logprobs"), "top_logprobs"
        count = body.integer(name, default=0 if wanted else None, least=0)
        if count is not None and not wanted:
            body.fail(name, "it needs logprobs = true")
    if count is not None and count > _MOST_TOP:
        body.expected(name, f"a whole number up to {_MOST_TOP}", count)
    found: int | None = count
    return found


def _include_usage(body: _Body, stream: bool) -> bool:
    options = body.get("stream_options")[1]
    if options is None:
        return False
    if not isinstance(options, dict):
        body.expected("stream_options", "an object", options)
    if not stream:
        body.fail("stream_options", "it needs stream = true")
    inner = _Body(options, body.loc, "stream_options.")
    return inner.flag("include_usage")


def _refuse(body: _Body) -> None:
    """Raises: a field would change the answer, and this server does not know how."""
    for name in body.unread():
        value = body.values[name]
        if name in UNSUPPORTED or (name == "echo" and value):
            if has_effect(name, value) or name == "echo":
                body.fail(name, "it is not supported here", "leave it out")
        elif name not in HARMLESS and value is not None:
            body.fail(name, "there is no such field", suggest(name, _FIELDS))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
