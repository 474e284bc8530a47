"""`LocalMember`: a `SageLLMEngine` of this process as a member of a fleet."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from attrs import evolve, frozen

from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime.control_plane.attach import Figures, engine_metadata
from sagellm_ir.runtime.control_plane.member import NOTHING, EngineLost, Piece, SoFar, Usage
from sagellm_ir.runtime.engines import ServingTokenizer
from sagellm_ir.runtime.engines.answers import (
    EngineBusy,
    EngineDraining,
    EngineFailed,
    StreamDelta,
    StreamEnd,
)
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine

__all__ = ["LocalMember", "resume_at"]

NEARLY_NOW = 1.0


class LocalMember:
    """An engine of this process."""

    def __init__(self, engine: SageLLMEngine) -> None:
        self.engine = engine
        self.engine_id = engine.engine_id

    async def stream(
        self, request: Request, so_far: SoFar = NOTHING
    ) -> AsyncGenerator[Piece, None]:
        """The rest of an answer; see `Member.stream`."""
        start = await self._start(request, so_far)
        if start.done >= request.max_new_tokens:
            yield Piece(finish="length")
            return
        rest = evolve(
            request,
            prompt=TokenPrompt(start.prompt),
            max_new_tokens=request.max_new_tokens - start.done,
        )
        skip, told = start.skip, so_far.count - start.done
        try:
            async with aclosing(self.engine.stream(rest)) as events:
                async for event in events:
                    if isinstance(event, StreamDelta):
                        text, skip = event.text[skip:], max(0, skip - len(event.text))
                        yield Piece(text, (event.token,) if event.index >= told else ())
                    elif isinstance(event, StreamEnd):
                        yield Piece(finish=event.response.finish, usage=_usage(event, start.done))
        except EngineBusy as error:
            raise EngineLost(str(error), error.retry_after) from None
        except EngineDraining as error:
            raise EngineLost(str(error), NEARLY_NOW) from None
        except EngineFailed as error:
            raise EngineLost(str(error)) from None

    async def health_check(self) -> bool:
        """Whether the engine can answer."""
        return await self.engine.health_check()

    def metadata(
        self, instance_type: str = "general", kv_schema: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a Control Plane should know of it."""
        return engine_metadata(
            "sagellm",
            self.engine.get_capability(),
            instance_type=instance_type,
            kv_schema=kv_schema,
        )

    def figures(self) -> Figures:
        """How busy it is."""
        load, target = self.engine.load(), self.engine.loaded.target
        block = target.block_size * target.model.kv_bytes_per_token
        return Figures(
            load.running, load.waiting, load.kv_used_blocks * block, load.kv_capacity_blocks * block
        )

    async def _start(self, request: Request, so_far: SoFar) -> "_Start":
        prompt = tuple(await self.engine.encode(request))
        tokenizer, tokens = self.engine.loaded.tokenizer, so_far.tokens
        if not so_far.count:
            return _Start(prompt)
        if tokenizer is None:
            return _Start(prompt + tokens, len(tokens))
        if not tokens:  # The engine that began told none.
            tokens = tuple(tokenizer.encode(so_far.text))
        keep, skip = resume_at(tokenizer, tokens, so_far.text)
        return _Start(prompt + tokens[:keep], keep, skip)


@frozen
class _Start:
    """Where an answer goes on."""

    prompt: tuple[int, ...]
    """Its own tokens that are kept come last."""
    done: int = 0
    """How many those are."""
    skip: int = 0
    """Characters after them that were sent already."""


def _usage(end: StreamEnd, done: int) -> Usage:
    answer = end.response
    found = Usage(
        answer.prompt_tokens,
        len(answer.tokens),
        answer.cached_tokens,
        answer.metrics.kv_used_bytes,
    )
    return found.without(done)


def resume_at(tokenizer: ServingTokenizer, tokens: Sequence[int], sent: str) -> tuple[int, int]:
    """Where an answer goes on: how many of its tokens to keep, and characters sent beyond them.

    An engine holds text back while a character or a possible stop string is incomplete, so the
    tokens may be ahead of the text. The last of them whose text was all sent is the place.
    """
    for keep in range(len(tokens), 0, -1):
        text = tokenizer.decode(tokens[:keep])
        if sent.startswith(text):
            return keep, len(sent) - len(text)
    return 0, len(sent)
