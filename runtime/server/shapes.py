"""How answers look in the OpenAI API: whole and as the chunks of a stream."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

from attrs import field, frozen

from sagellm_ir.runtime.backend import Likelihood
from sagellm_ir.runtime.engines import ServingTokenizer
from sagellm_ir.runtime.engines.answers import Response, StreamDelta

__all__ = ["ChatShape", "CompletionShape", "Shape", "usage"]


class Shape(Protocol):
    """Of one endpoint, for one answer."""

    def whole(self, responses: Sequence[Response], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that begins choice `index`, if it takes one."""
        ...

    def delta(self, index: int, delta: StreamDelta) -> dict[str, Any] | None:
        """A token's chunk; None when there is nothing to say."""
        ...

    def closing(self, index: int, response: Response) -> dict[str, Any]:
        """The last chunk of choice `index`."""
        ...

    def tail(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage, without choices."""
        ...


def usage(responses: Sequence[Response], answers: int) -> dict[str, Any]:
    """Token counts; a prompt that has several answers counts once."""
    firsts = responses[::answers]
    prompt = sum(response.prompt_tokens for response in firsts)
    made = sum(len(response.tokens) for response in responses)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached_tokens for r in firsts)},
    }


@frozen
class _Frame:
    """What all objects of one answer have in common."""

    id: str
    model: str
    tokenizer: ServingTokenizer | None
    usage_last: bool = False
    """Whether a usage chunk will come: then the others say that theirs is null."""
    created: int = field(factory=lambda: int(time.time()))

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def chunk(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return self.object(kind, [choice]) | ({"usage": None} if self.usage_last else {})

    def text(self, token: int) -> str:
        return self.tokenizer.decode([token]) if self.tokenizer else str(token)


class ChatShape(_Frame):
    """`/v1/chat/completions`."""

    def whole(self, responses: Sequence[Response], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": response.text, "refusal": None},
                "logprobs": self._logprobs(response.tokens, response.likelihoods),
                "finish_reason": response.finish,
            }
            for index, response in enumerate(responses)
        ]
        return self.object("chat.completion", choices) | {"usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, delta: StreamDelta) -> dict[str, Any] | None:
        if not delta.text and delta.likelihood is None:
            return None
        found = (delta.likelihood,) if delta.likelihood else ()
        return self._chunk(index, {"content": delta.text}, self._logprobs((delta.token,), found))

    def closing(self, index: int, response: Response) -> dict[str, Any]:
        return self._chunk(index, {}, finish=response.finish)

    def tail(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self.object("chat.completion.chunk", []) | {"usage": usage}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self.chunk("chat.completion.chunk", choice)

    def _logprobs(self, tokens: Sequence[int], found: Sequence[Likelihood]) -> Any:
        if not found:
            return None
        pairs = zip(tokens, found, strict=True)
        return {
            "content": [
                self._entry(token, likelihood.logprob)
                | {"top_logprobs": [self._entry(*one) for one in likelihood.top]}
                for token, likelihood in pairs
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionShape(_Frame):
    """`/v1/completions`."""

    def whole(self, responses: Sequence[Response], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            self._choice(
                index,
                response.text,
                self._logprobs(response.tokens, response.likelihoods),
                response.finish,
            )
            for index, response in enumerate(responses)
        ]
        return self.object("text_completion", choices) | {"usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(self, index: int, delta: StreamDelta) -> dict[str, Any] | None:
        if not delta.text and delta.likelihood is None:
            return None
        found = (delta.likelihood,) if delta.likelihood else ()
        logprobs = self._logprobs((delta.token,), found)
        return self.chunk("text_completion", self._choice(index, delta.text, logprobs, None))

    def closing(self, index: int, response: Response) -> dict[str, Any]:
        return self.chunk("text_completion", self._choice(index, "", None, response.finish))

    def tail(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self.object("text_completion", []) | {"usage": usage}

    def _choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[int], found: Sequence[Likelihood]) -> Any:
        """In the old form: parallel lists."""
        if not found:
            return None
        return {
            "tokens": [self.text(token) for token in tokens],
            "token_logprobs": [likelihood.logprob for likelihood in found],
            "top_logprobs": [
                {self.text(token): logprob for token, logprob in likelihood.top}
                for likelihood in found
            ],
        }
