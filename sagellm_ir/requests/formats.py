"""One record -> `Draft`s: which format is it, and what does it ask for.

| a record with | is |
|---|---|
| `custom_id`, `body` | a line of an OpenAI Batch file |
| `requests` | a coding-agent session: its turns, and nested sub-agents |
| `hash_ids` | a line of a Mooncake trace |
| `ContextTokens` | a row of an Azure trace |
| `input` | a turn of a recorded agent session |
| anything else | an OpenAI chat/completions body, plus the fields of `Request` |
"""

import re
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from attrs import frozen

from sagellm_ir.nodes import Location
from sagellm_ir.request import Prompt, Sampling, TextPrompt, TracePrompt
from sagellm_ir.requests.fields import Fields
from sagellm_ir.requests.prompts import read_prompts, read_sampling
from sagellm_ir.requests.source import Record

__all__ = ["Draft", "TraceIds", "drafts"]

MOONCAKE_BLOCK = 512
"""Tokens of a block of the Mooncake traces (R. Qin et al., FAST 2025); `block_size` overrides."""
CODING_AGENT_BLOCK = 64
"""Tokens of a block of the coding-agent sessions; `block_size` overrides."""
_DEPTH = 16
_MOST_COPIES = 1024
_NS = {"s": 10**9, "ms": 10**6, "us": 10**3}
_BATCH_URLS = ("/v1/chat/completions", "/v1/completions")
_ID = ("id", "custom_id")
_SESSION = ("session", "session_id")
_MAX_NEW = ("max_new_tokens", "max_completion_tokens", "max_tokens")
_COMMON = frozenset(
    {*_ID, *_SESSION, *_MAX_NEW, "priority", "deadline", "adapter", "tenant", "arrival"}
)
_COUNT = re.compile(r"[0-9]{1,18}")
_TRACE_ID = (1 << 53) - 1
_GREEDY = Sampling()


@frozen
class Draft:
    """A request before the loader gives it an id and places it on the workload's clock."""

    fields: dict[str, Any]
    """Arguments of `Request` but `prompt`; `id` is None when the record has none."""
    prompts: list[Prompt]
    """One a request."""
    loc: Location
    stamp: int | None = None
    """Nanoseconds on the source's own clock; None when `arrival` was given."""
    copies: int = 1
    """How many answers to each prompt are wanted."""
    unknown: tuple[str, ...] = ()
    """Fields of the record that mean nothing here."""


class TraceIds:
    """Keeps the block ids of sources, and of sessions with local ids, apart from each other."""

    def __init__(self) -> None:
        self._base = self._next = 0

    def scoped(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The ids of the current scope, unlike those of every other scope."""
        base = self._base
        if ids:
            self._next = max(self._next, base + max(ids) + 1)
        return tuple(map(base.__add__, ids)) if base else ids

    def new_scope(self) -> None:
        """Ids seen from here on have nothing to do with earlier ones."""
        self._base = self._next


def drafts(record: Record, trace_ids: TraceIds) -> list[Draft]:
    """What a record asks for.

    Raises:
        SageIRError: a field is missing or wrong.
    """
    value = record.value
    if isinstance(value, str | list):
        value = {"prompt" if isinstance(value, str) else "tokens": value}
    if not isinstance(value, dict):
        Fields({}, record.loc).expected("record", "an object, a text or a list of ids", value)
    fields = Fields(value, record.loc)
    if "body" in value:
        return [_batch(fields)]
    if "hash_ids" in value:
        return [_mooncake(fields, trace_ids)]
    if "requests" in value:
        return _session(fields, trace_ids)
    if "ContextTokens" in value:
        return [_azure(fields)]
    if "input" in value:
        return [_agent(fields)]
    return [_body(fields)]


def _common(fields: Fields) -> dict[str, Any]:
    """The fields every format may carry."""
    if _COMMON.isdisjoint(fields.values):  # lines of a trace
        return {"id": None}
    common: dict[str, Any] = {
        "id": _id(fields),
        "priority": fields.integer("priority", default=0),
        "deadline": fields.number("deadline"),
        "adapter": fields.text("adapter"),
        "tenant": fields.text("tenant"),
        "session": fields.text(*_SESSION),
    }
    if (arrival := fields.number("arrival")) is not None:
        common["arrival"] = float(arrival)
    if (most := fields.integer(*_MAX_NEW, least=1)) is not None:
        common["max_new_tokens"] = most
    return common


def _id(fields: Fields) -> str | None:
    name, value = fields.get(*_ID)
    if type(value) is int:
        return str(value)
    if value is not None and (not isinstance(value, str) or not value or len(value) > 256):
        fields.expected(name, "a text of 1 to 256 characters", value)
    if value is not None and not value.isprintable():
        fields.expected(name, "a text of printable characters", value)
    return value


def _stamp(fields: Fields, unit: str) -> int | None:
    """`timestamp` in nanoseconds; None when there is none, or `arrival` says more."""
    value = fields.number("timestamp")
    if value is None or fields.values.get("arrival") is not None:
        return None
    nanoseconds: int = round(value * _NS[unit])
    return nanoseconds


def _one(
    fields: Fields, prompt: Prompt, stamp: int | None, sampling: Sampling = _GREEDY, **more: Any
) -> Draft:
    """A draft of a record that is one request."""
    request = {**_common(fields), **more, "sampling": sampling}
    return Draft(request, [prompt], fields.loc, stamp, 1, tuple(fields.unread()))


def _body(fields: Fields) -> Draft:
    request = {**_common(fields), "sampling": read_sampling(fields)}
    copies = fields.integer("n", default=1, least=1)
    if copies > _MOST_COPIES:
        fields.expected("n", f"at most {_MOST_COPIES}", copies)
    stamp = _stamp(fields, "s")
    prompts = read_prompts(fields)
    return Draft(request, prompts, fields.loc, stamp, copies, tuple(fields.unread()))


def _batch(fields: Fields) -> Draft:
    """`{"custom_id", "method", "url", "body"}`; scheduling fields may stand beside the body."""
    body = fields.get("body")[1]
    if not isinstance(body, dict):
        fields.expected("body", "an object", body)
    method, url = fields.get("method")[1], fields.get("url")[1]
    if method not in (None, "POST"):
        fields.expected("method", "'POST'", method)
    if url is not None and url not in _BATCH_URLS:
        fields.expected("url", " or ".join(map(repr, _BATCH_URLS)), url)
    outer = {name: fields.values[name] for name in fields.unread()}
    return _body(Fields({**body, **outer}, fields.loc))


def _mooncake(fields: Fields, trace_ids: TraceIds) -> Draft:
    prompt = _trace(fields, "input_length", trace_ids, MOONCAKE_BLOCK)
    # A trace may record an empty answer; a request makes at least one token.
    answer = fields.integer("output_length", least=0)
    more = {} if answer is None else {"max_new_tokens": max(1, answer)}
    return _one(fields, prompt, _stamp(fields, "ms"), **more)


def _trace(fields: Fields, length: str, trace_ids: TraceIds, block_size: int) -> TracePrompt:
    """A prompt known by its block ids; the id of a last block that is not full may be left out."""
    tokens = fields.required(length, 1)
    size = fields.integer("block_size", default=block_size, least=1)
    ids = fields.integers("hash_ids", fields.get("hash_ids")[1], "a list of block ids", _TRACE_ID)
    least, most = tokens // size, -(-tokens // size)
    if not least <= len(ids) <= most:
        wanted = f"{least}" if least == most else f"{least} or {most}"
        message = f"expected {wanted} ids for {tokens} tokens in blocks of {size}, got {len(ids)}"
        fields.fail("hash_ids", message)
    return TracePrompt(trace_ids.scoped(ids), tokens, size)


def _agent(fields: Fields) -> Draft:
    text = fields.text("input")
    if text is None:
        fields.expected("input", "a text that is not empty", None)
    output = fields.get("output")[1]
    if output is not None and not isinstance(output, str):
        fields.expected("output", "a text", output)
    sampling = read_sampling(fields)
    stamp = _stamp(fields, "us")
    return _one(fields, TextPrompt(text), stamp, sampling, recorded_output=output)


def _azure(fields: Fields) -> Draft:
    """`TIMESTAMP,ContextTokens,GeneratedTokens`: lengths only, so nothing is ever shared."""
    row: dict[str, Any] = dict(fields.values)
    for name in ("ContextTokens", "GeneratedTokens"):
        text = row.get(name)
        row[name] = int(text) if isinstance(text, str) and _COUNT.fullmatch(text) else text
    fields = Fields(row, fields.loc)
    prompt = TracePrompt((), fields.required("ContextTokens", 1), MOONCAKE_BLOCK)
    answer = fields.required("GeneratedTokens", 0)
    return _one(fields, prompt, _clock(fields), max_new_tokens=max(1, answer))


def _clock(fields: Fields) -> int:
    """`TIMESTAMP` (2023-11-16 18:15:46.6805900, UTC) in nanoseconds."""
    value = fields.get("TIMESTAMP")[1]
    try:
        whole, _, fraction = str(value).partition(".")
        seconds = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc).timestamp()
        return int(seconds) * 10**9 + int((fraction + "0" * 9)[:9])
    except ValueError:
        fields.expected("TIMESTAMP", "a date and time", value)


def _session(fields: Fields, trace_ids: TraceIds) -> list[Draft]:
    """A session a line: block ids are local to it, and a sub-agent's clock starts with it."""
    name = _id(fields) or f"session{fields.loc.line}"
    shared = {key: fields.text(key) for key in ("tenant", "adapter")}
    size = fields.integer("block_size", default=CODING_AGENT_BLOCK, least=1)
    if fields.get("hash_id_scope")[1] in (None, "local"):
        trace_ids.new_scope()
    made = []
    for session, start, turns in _threads(fields, name, fields.number("arrival", default=0.0)):
        for at, turn in enumerate(turns):
            prompt = _trace(turn, "in", trace_ids, size)
            request = {
                **shared,
                "id": f"{session}.{at}",
                "session": session,
                "arrival": start + turn.number("t", default=0.0),
                "max_new_tokens": max(1, turn.integer("out", default=0, least=0)),
            }
            made.append(Draft(request, [prompt], fields.loc))
    return made


def _threads(
    fields: Fields, session: str, start: float, depth: int = 0
) -> Iterator[tuple[str, float, list[Fields]]]:
    """(session, start, turns) of the session itself, then of each sub-agent."""
    if depth > _DEPTH:
        fields.fail("requests", f"sub-agents are nested more than {_DEPTH} deep")
    elements = fields.get("requests")[1]
    if not isinstance(elements, list):
        fields.expected("requests", "a list of turns", elements)
    turns: list[Fields] = []
    agents: list[Fields] = []
    for at, element in enumerate(elements):
        where = f"{fields.prefix}requests[{at}]"
        if not isinstance(element, dict):
            fields.expected(f"requests[{at}]", "an object", element)
        inner = Fields(element, fields.loc, f"{where}.")
        (agents if "requests" in element else turns).append(inner)
    yield session, start, turns
    for number, agent in enumerate(agents):
        begin = start + agent.number("t", default=0.0)
        name = agent.text("agent_id") or f"agent{number}"
        yield from _threads(agent, f"{session}.{name}", begin, depth + 1)
