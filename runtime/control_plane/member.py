"""A member of a fleet: an engine, here or behind HTTP, that can start an answer or go on with one."""

from collections.abc import AsyncGenerator
from typing import Protocol

from attrs import frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.request import Request
from sagellm_ir.runtime.backend import Finish

__all__ = ["NOTHING", "EngineLost", "Member", "Piece", "SoFar", "Usage"]


@frozen
class Usage:
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV was there already."""
    kv_bytes: int = 0
    """Of its KV at the end; 0 where the engine does not tell."""

    def without(self, done: int) -> "Usage":
        """Of the whole answer, whose first `done` tokens the engine took as prompt."""
        prompt = max(0, self.prompt_tokens - done)
        made = self.completion_tokens + done
        return Usage(prompt, made, min(self.cached_tokens, prompt), self.kv_bytes)


@frozen
class Piece:
    """What an engine adds to an answer."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    """Empty when the engine tells no token ids."""
    finish: Finish | None = None
    usage: Usage | None = None
    """With the last piece, when the engine tells it."""


@frozen
class SoFar:
    """What of an answer was made already, by engines that are gone."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    """All of its tokens, or none when an engine did not tell them."""
    count: int = 0
    """Its tokens as far as they can be counted: where ids are not told, pieces."""

    def plus(self, piece: Piece) -> "SoFar":
        """With one more piece."""
        told = len(self.tokens) == self.count and piece.tokens
        count = self.count + (len(piece.tokens) or bool(piece.text))
        tokens = self.tokens + piece.tokens if told else ()
        return SoFar(self.text + piece.text, tokens, count)


NOTHING = SoFar()
"""An answer that has not begun."""


class EngineLost(SageIRError):
    """An engine cannot go on with a request that nothing is wrong with; another engine can.

    `retry_after` says in how many seconds this one may take it again; None: it failed or is gone.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(Diagnostic(message))
        self.retry_after = retry_after


class Member(Protocol):
    """An engine as a fleet sees it."""

    engine_id: str

    def stream(self, request: Request, so_far: SoFar = NOTHING) -> AsyncGenerator[Piece, None]:
        """The rest of an answer. The last piece has a `finish`.

        Raises:
            EngineLost: the engine cannot go on; nothing is wrong with the request.
            SageIRError: the request is wrong.
        """
        ...

    async def health_check(self) -> bool:
        """Whether it answers at all."""
        ...
