"""A Control Plane of this process, for a client in another of its threads."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar
from uuid import uuid4

from sagellm_control import ControlPlaneManager
from sagellm_protocol import ChatMessage, SamplingParams
from sagellm_protocol import Request as ProtocolRequest

from sagellm_ir.diagnostics import Diagnostic, SageIRError

__all__ = ["InProcess"]

T = TypeVar("T")
Json = dict[str, Any]
DEFAULT_MAX_TOKENS = 512


class InProcess:
    """Made in the Control Plane's event loop, used from other threads.

    Args:
        manager: the Control Plane.
        timeout: seconds for a whole answer, or for the next event of a stream.
    """

    def __init__(self, manager: ControlPlaneManager, timeout: float) -> None:
        self._manager, self._timeout = manager, timeout
        self._loop = asyncio.get_running_loop()

    def models(self) -> list[str]:
        """The models of engines that accept requests."""
        ready = [info for info in self._manager.list_engines() if info.is_accepting_requests]
        return list(dict.fromkeys(info.model_id for info in ready))

    def engines(self) -> list[Json]:
        """The registry."""
        return [info.to_dict() for info in self._manager.list_engines()]

    def post(self, path: str, body: Json) -> Json:
        """One request, scheduled and answered."""
        answer = self._wait(self._manager.execute_request(_request(body)))
        if answer.error is not None:
            raise SageIRError(Diagnostic(answer.error.message))
        made = len(answer.output_tokens)
        asked = answer.prompt_tokens or 0
        chat = path.endswith("chat/completions")
        content: Json = (
            {"message": {"role": "assistant", "content": answer.output_text}}
            if chat
            else {"text": answer.output_text}
        )
        return {
            "id": answer.request_id,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [{"index": 0, **content, "finish_reason": answer.finish_reason}],
            "usage": {
                "prompt_tokens": asked,
                "completion_tokens": made,
                "total_tokens": asked + made,
            },
        }

    def stream(self, path: str, body: Json) -> Iterator[Json]:
        """One request, event by event."""
        events = aiter(self._manager.stream_request(_request(body)))
        try:
            while (event := self._wait(_next(events))) is not None:
                if event.event == "delta":
                    delta = {"index": 0, "delta": {"content": event.content}}
                    yield {"object": "chat.completion.chunk", "choices": [delta]}
                if event.event == "end" and event.error is not None:
                    raise SageIRError(Diagnostic(event.error.message))
        finally:
            self._wait(events.aclose())

    def close(self) -> None:
        """Nothing is open."""

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(self._timeout)


async def _next(events: AsyncIterator[T]) -> T | None:
    return await anext(events, None)


def _request(body: Json) -> ProtocolRequest:
    """A protocol request from a body of the OpenAI API."""
    stop = body.get("stop")
    return ProtocolRequest(
        request_id=str(body.get("request_id") or f"chat-{uuid4().hex}"),
        trace_id=uuid4().hex,
        model=body["model"],
        prompt=body.get("prompt", ""),
        messages=[ChatMessage(**message) for message in body["messages"]]
        if "messages" in body
        else None,
        max_tokens=body.get("max_tokens", DEFAULT_MAX_TOKENS),
        stream=bool(body.get("stream")),
        temperature=body.get("temperature"),
        top_p=body.get("top_p"),
        sampling_params=SamplingParams(
            top_k=body.get("top_k", 0),
            seed=body.get("seed"),
            stop_sequences=[stop] if isinstance(stop, str) else stop,
        ),
        metadata=body.get("metadata"),
    )
