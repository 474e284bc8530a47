"""`UnifiedInferenceClient`: SAGE's client, for whatever fleet is there.

It speaks to a gateway, or to a Control Plane of the same process; which engine answers (sageLLM,
vLLM, LMDeploy) is the Control Plane's choice.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.ports import gateway_port

if TYPE_CHECKING:
    from sagellm_control import ControlPlaneManager

__all__ = ["UnifiedInferenceClient", "checked_url", "gateway_key", "gateway_url"]

GATEWAY_VARIABLE = "SAGELLM_GATEWAY_URL"
KEY_VARIABLE = "SAGELLM_GATEWAY_KEY"
Message = Mapping[str, str]
Json = dict[str, Any]


def gateway_url() -> str:
    """The gateway of this machine: `SAGELLM_GATEWAY_URL`, else loopback at SAGE's gateway port."""
    return os.environ.get(GATEWAY_VARIABLE) or f"http://127.0.0.1:{gateway_port()}"


def gateway_key() -> str | None:
    """What a gateway with keys is asked with: `SAGELLM_GATEWAY_KEY`."""
    return os.environ.get(KEY_VARIABLE) or None


def checked_url(url: str) -> str:
    """The URL of a server; without a scheme it is `http://`.

    Raises:
        SageIRError: it names no host.
    """
    try:
        found = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL:
        found = httpx.URL()
    if found.scheme not in ("http", "https") or not found.host:
        raise SageIRError(Diagnostic(f"{url!r}: expected http://HOST:PORT"))
    return str(found)


class Transport(Protocol):
    """How a client reaches a fleet."""

    def models(self) -> list[str]:
        """The models that can be asked."""
        ...

    def engines(self) -> list[Json]:
        """The engines behind it: `engine_id`, `model_id`, `state`, ..."""
        ...

    def post(self, path: str, body: Json) -> Json:
        """One request, and its answer in OpenAI's form."""
        ...

    def stream(self, path: str, body: Json) -> Iterator[Json]:
        """One request, and its chunks in OpenAI's form."""
        ...

    def close(self) -> None:
        """Close its connections."""
        ...


class UnifiedInferenceClient:
    """Asks models, by the call shape of SAGE's client. Make it with `create`.

    It may be used as a context manager.
    """

    def __init__(self, transport: Transport, model: str | None = None) -> None:
        self._transport, self._model = transport, model

    @classmethod
    def create(
        cls,
        control_plane_url: str | None = None,
        *,
        default_llm_model: str | None = None,
        timeout: float = 600.0,
        api_key: str | None = None,
        control_plane: "ControlPlaneManager | None" = None,
    ) -> "UnifiedInferenceClient":
        """A client of a gateway, or of a Control Plane in this process.

        Args:
            control_plane_url: the gateway's base URL; default: `gateway_url()`.
            default_llm_model: asked when a call names none; default: the first that is served.
            timeout: seconds without a byte of an answer.
            api_key: sent as a bearer token; default: `gateway_key()`.
            control_plane: a manager of this process, instead of a gateway. `create` is then called
                in its event loop, and the methods in other threads.
        """
        if control_plane is not None:
            from sagellm_ir.runtime.control_plane.in_process_client import InProcess

            return cls(InProcess(control_plane, timeout), default_llm_model)
        url = control_plane_url or gateway_url()
        return cls(_Gateway(url, timeout, api_key or gateway_key()), default_llm_model)

    def chat(
        self, messages: Sequence[Message], model: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """The answer to a conversation, in OpenAI's form.

        Args:
            messages: `{"role": ..., "content": ...}`.
            model: which to ask.
            options: of the API: `max_tokens`, `temperature`, `stop`, ...

        Raises:
            SageIRError: no gateway, no model, or the request is refused.
        """
        return self._transport.post("/v1/chat/completions", self._chat(messages, model, options))

    def generate(self, prompt: str, model: str | None = None, **options: Any) -> dict[str, Any]:
        """What follows a text, in OpenAI's form; see `chat`."""
        body = {"model": self._pick(model), "prompt": prompt, **options}
        return self._transport.post("/v1/completions", body)

    def stream(
        self, messages: Sequence[Message] | str, model: str | None = None, **options: Any
    ) -> Iterator[str]:
        """The text of an answer to a conversation or a user's words, as it is made; see `chat`."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        body = {**self._chat(turns, model, options), "stream": True}
        for chunk in self._transport.stream("/v1/chat/completions", body):
            for choice in chunk.get("choices", ()):
                if text := (choice.get("delta") or {}).get("content"):
                    yield text

    def models(self) -> list[str]:
        """The models that can be asked."""
        return self._transport.models()

    def engines(self) -> list[dict[str, Any]]:
        """The engines that serve them: `engine_id`, `model_id`, `state`, ..."""
        return self._transport.engines()

    def close(self) -> None:
        """Close its connections."""
        self._transport.close()

    def __enter__(self) -> "UnifiedInferenceClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chat(self, messages: Sequence[Message], model: str | None, options: Json) -> Json:
        return {
            "model": self._pick(model),
            "messages": [dict(message) for message in messages],
            **options,
        }

    def _pick(self, model: str | None) -> str:
        chosen = model or self._model
        if chosen is None:
            served = self.models()
            if not served:
                help_ = "start one: `sagellm-ir llm engine start MODEL`"
                raise SageIRError(Diagnostic("no engine serves a model", help=help_))
            chosen = self._model = served[0]
        return chosen


class _Gateway:
    """A fleet behind a gateway."""

    def __init__(self, url: str, timeout: float, api_key: str | None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = checked_url(url).rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=timeout)

    def models(self) -> list[str]:
        return [model["id"] for model in self._json("GET", "/v1/models")["data"]]

    def engines(self) -> list[Json]:
        found: list[Json] = self._json("GET", "/v1/management/engines")["engines"]
        return found

    def post(self, path: str, body: Json) -> Json:
        return self._json("POST", path, body)

    def stream(self, path: str, body: Json) -> Iterator[Json]:
        try:
            with self._http.stream("POST", path, json=body) as reply:
                if reply.is_error:
                    reply.read()
                    raise self._refused(reply)
                for line in reply.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data not in ("", "[DONE]"):
                        yield self._checked(json.loads(data))
        except httpx.HTTPError as error:
            raise self._lost(error) from None

    def close(self) -> None:
        self._http.close()

    def _json(self, method: str, path: str, body: Json | None = None) -> Json:
        try:
            reply = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._lost(error) from None
        if reply.is_error:
            raise self._refused(reply)
        try:
            found: Json = reply.json()
        except ValueError:
            raise SageIRError(
                Diagnostic(f"{self._url} is no gateway: it answers no JSON")
            ) from None
        return found

    def _checked(self, chunk: Json) -> Json:
        if "error" in chunk:
            raise SageIRError(Diagnostic(f"{self._url} failed: {chunk['error']}"))
        return chunk

    def _refused(self, reply: httpx.Response) -> SageIRError:
        return SageIRError(
            Diagnostic(f"{self._url} answered {reply.status_code}: {reply.text[:500]}")
        )

    def _lost(self, error: httpx.HTTPError) -> SageIRError:
        return SageIRError(
            Diagnostic(
                f"no gateway answers at {self._url}: {error or type(error).__name__}",
                help="start one with `sagellm-ir gateway start`, or set " + GATEWAY_VARIABLE,
            )
        )
