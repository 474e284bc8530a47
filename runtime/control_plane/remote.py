"""`RemoteEngine`: any engine with an OpenAI API as a member of a fleet.

It sends all that a request says, unlike the Control Plane's own HTTP client, which sends only the
messages, `max_tokens`, `temperature` and `top_p`, and posts again after a failure.
"""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.request import ChatPrompt, Request, TextPrompt, TokenPrompt
from sagellm_ir.runtime.backend import Finish
from sagellm_ir.runtime.control_plane.member import (
    NOTHING,
    EngineLost,
    Piece,
    SoFar,
    Usage,
)

__all__ = ["RemoteEngine", "engine_url", "request_body"]

BUSY = (429, 503)
TIMEOUT = httpx.Timeout(10.0, read=None)
"""Reads wait for as long as the engine is healthy: `relay` asks it."""
FINISHES: Mapping[str, Finish] = {"stop": "stop", "length": "length"}


def engine_url(host: str, port: int) -> str:
    """The base URL of an engine at a name or an address.

    Raises:
        SageIRError: `host` is neither.
    """
    text = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    with contextlib.suppress(httpx.InvalidURL):
        if host and httpx.URL(text).host == host.lower():
            return text
    raise SageIRError(Diagnostic(f"host: expected a name or an address, got {host!r}"))


class RemoteEngine:
    """An engine at a URL.

    Args:
        engine_id: in the fleet.
        url: its base, without `/v1`.
        model: the model's name there.
        api_key: sent as a bearer token.
    """

    def __init__(self, engine_id: str, url: str, model: str, api_key: str | None = None) -> None:
        self.engine_id, self.model = engine_id, model
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT, limits=httpx.Limits()
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def health_check(self) -> bool:
        """Whether `GET /health` answers 200 in time."""
        try:
            return (await self._http.get("/health", timeout=5.0)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def stream(
        self, request: Request, so_far: SoFar = NOTHING
    ) -> AsyncGenerator[Piece, None]:
        """The rest of an answer; see `Member.stream`."""
        if so_far.count >= request.max_new_tokens:
            yield Piece(finish="length")
            return
        path, body = request_body(request, self.model, so_far)
        try:
            async with self._http.stream(
                "POST", path, json=body, headers={"x-request-id": request.id}
            ) as reply:
                await self._check(reply)
                async for piece in _pieces(reply.aiter_lines(), so_far.count):
                    yield piece
        except httpx.HTTPError as error:
            message = f"engine {self.engine_id!r}: {error or type(error).__name__}"
            raise EngineLost(message) from None

    async def _check(self, reply: httpx.Response) -> None:
        if not reply.is_error:
            return
        text = _reason((await reply.aread()).decode(errors="replace"))
        message = f"engine {self.engine_id!r} answered {reply.status_code}: {text}"
        if reply.status_code in BUSY:
            wait = reply.headers.get("retry-after", "1")
            raise EngineLost(message, float(wait) if wait.isdigit() else 1.0)
        if reply.is_server_error:
            raise EngineLost(message)
        raise SageIRError(Diagnostic(message))


def _reason(body: str) -> str:
    """The message of an error in OpenAI's form, or the start of whatever it is."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:500]


def request_body(request: Request, model: str, so_far: SoFar) -> tuple[str, dict[str, Any]]:
    """Where to post a request, and what.

    A started answer is continued as vLLM and LMDeploy do it: as an unfinished assistant message
    at the end of a chat, or at the end of a text prompt.

    Raises:
        EngineLost: the answer was started from token ids and its own are not known.
        SageIRError: the prompt is one of a trace.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_new_tokens - so_far.count,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= {"top_k": sampling.top_k} if sampling.top_k else {}
    body |= {"seed": sampling.seed} if sampling.seed is not None else {}
    body |= {"stop": list(sampling.stop)} if sampling.stop else {}
    # KV is shared within a salt only: vLLM's name for what a tenant is here.
    body |= {"cache_salt": request.tenant} if request.tenant else {}
    match request.prompt:
        case ChatPrompt(messages, started):
            turns = [{"role": turn.role, "content": turn.content} for turn in messages]
            if begun := started + so_far.text:
                turns.append({"role": "assistant", "content": begun})
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            return "/v1/chat/completions", body | {"messages": turns}
        case TextPrompt(text):
            return "/v1/completions", body | {"prompt": text + so_far.text}
        case TokenPrompt(tokens):
            if so_far.count and len(so_far.tokens) != so_far.count:
                raise EngineLost("the answer so far is not known in tokens")
            return "/v1/completions", body | {"prompt": [*tokens, *so_far.tokens]}
    raise SageIRError(Diagnostic(f"request {request.id!r}: a trace has no content to serve"))


async def _pieces(lines: AsyncIterator[str], done: int) -> AsyncIterator[Piece]:
    """The answer in a stream of server-sent events; the finish comes last, with the usage.

    The engine took the answer's first `done` tokens as prompt.
    """
    finish: Finish | None = None
    usage: Usage | None = None
    async for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or not data:
            continue
        if data == "[DONE]":
            break
        event = _event(data)
        if "error" in event:
            raise EngineLost(f"the engine failed: {event['error']}")
        usage = _usage(event.get("usage"), done) or usage
        for choice in event.get("choices", ()):
            text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            if text:
                yield Piece(text, tuple(choice.get("token_ids") or ()))
            finish = FINISHES.get(choice.get("finish_reason") or "", finish)
    if finish is not None:
        yield Piece(finish=finish, usage=usage)


def _event(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise EngineLost(f"the engine sent what is no event: {data[:200]!r}")
    return event


def _usage(found: Mapping[str, Any] | None, done: int) -> Usage | None:
    if not found:
        return None
    details = found.get("prompt_tokens_details") or {}
    return Usage(
        found.get("prompt_tokens", 0),
        found.get("completion_tokens", 0),
        details.get("cached_tokens") or 0,
    ).without(done)
