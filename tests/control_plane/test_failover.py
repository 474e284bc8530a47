"""An engine that fails in the middle of an answer: the text still comes exactly once."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from attrs import evolve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime.control_plane.failover import relay
from sagellm_ir.runtime.control_plane.local import LocalMember, resume_at
from sagellm_ir.runtime.control_plane.member import NOTHING, EngineLost, Member, Piece, SoFar
from sagellm_ir.runtime.engines.embedded.tokenizer import Detokenizer, ModelTokenizer
from tests.control_plane.tiny_fleet import (
    SHARED,
    ask,
    chat,
    expected,
    tiny_engine,
    tiny_member,
)


class Dies:
    """A real engine whose process is gone after some pieces: it stops, and answers nothing."""

    def __init__(self, inner: LocalMember, after: int) -> None:
        self.engine_id, self._inner, self._left = inner.engine_id, inner, after

    async def stream(
        self, request: Request, so_far: SoFar = NOTHING
    ) -> AsyncGenerator[Piece, None]:
        async for piece in self._inner.stream(request, so_far):
            if self._left == 0:
                await asyncio.to_thread(self._inner.engine.stop)
                raise EngineLost(f"{self.engine_id} died")
            self._left -= 1
            yield piece

    async def health_check(self) -> bool:
        return await self._inner.health_check()


class Fleet:
    """Members in a fixed order, and who was asked and let go."""

    def __init__(self, *members: Member) -> None:
        self.members = members
        self.log: list[str] = []

    async def take(self, failed: frozenset[str]) -> Member:
        for member in self.members:
            if member.engine_id not in failed:
                self.log.append(f"+{member.engine_id}")
                return member
        raise EngineLost("none left")

    def release(self, engine: str, so_far: SoFar, lost: bool) -> None:
        self.log.append(f"-{engine}{' lost' * lost}")


async def answer(fleet: Fleet, request: Request) -> tuple[str, list[int], Piece]:
    text, tokens, last = "", list[int](), Piece()
    async for last in relay(request, fleet.take, fleet.release):
        text += last.text
        tokens += last.tokens
    return text, tokens, last


@pytest.mark.parametrize("after", [0, 1, 7, 23])
@pytest.mark.parametrize("request_", [ask("r", "Once upon a time"), chat("r", "hi")])
def test_the_answer_goes_on_where_it_stopped(request_: Request, after: int) -> None:
    async def run() -> None:
        async with tiny_member("a") as a, tiny_member("b") as b:
            fleet = Fleet(Dies(a, after), b)
            text, tokens, last = await answer(fleet, request_)
            assert text == expected(request_)
            assert len(tokens) == request_.max_new_tokens
            assert fleet.log == ["+a", "-a lost", "+b", "-b"]
            assert last.finish == "length"
            assert last.usage is not None
            assert last.usage.completion_tokens == len(tokens)
            assert last.usage.prompt_tokens == len(await b.engine.encode(request_))

    asyncio.run(run())


def test_what_a_second_engine_had_cached_is_of_the_prompt_only() -> None:
    """It took the answer so far as prompt, and may hold that too: more than the whole prompt."""

    async def run() -> None:
        request, start = ask("r", "Once"), "Once"
        async with tiny_member("a") as a, tiny_member("b") as b:
            await answer(Fleet(b), ask("q", start + expected(request), 2))
            _, _, last = await answer(Fleet(Dies(a, 20), b), request)
            assert last.usage is not None
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(start), 24)
            assert last.usage.cached_tokens == len(start)

    asyncio.run(run())


def test_two_engines_in_a_row_may_fail() -> None:
    async def run() -> None:
        async with tiny_member("a") as a, tiny_member("b") as b, tiny_member("c") as c:
            request = ask("r", "Once upon a time")
            fleet = Fleet(Dies(a, 5), Dies(b, 5), c)
            assert (await answer(fleet, request))[0] == expected(request)

    asyncio.run(run())


def test_a_stop_string_over_the_seam_is_found() -> None:
    async def run() -> None:
        whole = expected(ask("r", "Once upon a time"))
        stop = whole[6:10]
        request = ask("r", "Once upon a time", stop=(stop,))
        for after in range(5, 9):
            async with tiny_member("a") as a, tiny_member("b") as b:
                text, _, last = await answer(Fleet(Dies(a, after), b), request)
                assert text == whole[: whole.index(stop)]
                assert last.finish == "stop"

    asyncio.run(run())


def test_many_requests_survive_an_engine_that_is_stopped_under_them() -> None:
    async def run() -> None:
        async with tiny_member("b") as b:
            engine = tiny_engine("a")
            engine.start()
            fleet = Fleet(LocalMember(engine), b)
            requests = [ask(f"r{n}", f"{n} Once upon a time", 40) for n in range(8)]
            running = [asyncio.create_task(answer(fleet, request)) for request in requests]
            while engine.load().generated_tokens < 60:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(engine.stop)
            for request, done in zip(requests, await asyncio.gather(*running), strict=True):
                assert done[0] == expected(request)
            assert fleet.log.count("-a lost") >= 1

    asyncio.run(run())


def test_token_prompts_of_a_model_without_tokenizer() -> None:
    async def run() -> None:
        async with tiny_member("a") as a, tiny_member("b") as b:
            tokenizer = SHARED.tokenizer
            assert tokenizer is not None
            text = ask("r", "Once upon a time")
            tokens = TokenPrompt(tokenizer.encode("Once upon a time"))
            for member in (a, b):
                member.engine.loaded = evolve(member.engine.loaded, tokenizer=None)
            made = await answer(Fleet(Dies(a, 9), b), evolve(text, prompt=tokens))
            assert tokenizer.decode(made[1]) == expected(text)

    asyncio.run(run())


def test_when_none_is_left_the_last_reason_is_told() -> None:
    async def run() -> None:
        async with tiny_member("a") as a:
            fleet = Fleet(Dies(a, 3))
            with pytest.raises(EngineLost, match="a died"):
                await answer(fleet, ask("r", "Once"))
            assert fleet.log == ["+a", "-a lost"]

    asyncio.run(run())


def test_a_wrong_request_is_not_tried_elsewhere() -> None:
    class Refuses(Dies):
        async def stream(
            self, request: Request, so_far: SoFar = NOTHING
        ) -> AsyncGenerator[Piece, None]:
            raise SageIRError(Diagnostic("wrong"))
            yield Piece()

    async def run() -> None:
        async with tiny_member("a") as a, tiny_member("b") as b:
            fleet = Fleet(Refuses(a, 0), b)
            with pytest.raises(SageIRError, match="wrong"):
                await answer(fleet, ask("r", "Once"))
            assert fleet.log == ["+a", "-a"]

    asyncio.run(run())


def test_an_engine_that_hangs_is_left_when_its_health_check_fails() -> None:
    class Hangs(Dies):
        async def stream(
            self, request: Request, so_far: SoFar = NOTHING
        ) -> AsyncGenerator[Piece, None]:
            yield Piece("x", (0,))
            await asyncio.sleep(3600)

        async def health_check(self) -> bool:
            return False

    async def run() -> None:
        async with tiny_member("a") as a, tiny_member("b") as b:
            fleet = Fleet(Hangs(a, 0), b)
            pieces = relay(ask("r", "Once"), fleet.take, fleet.release, patience=0.05)
            assert len([piece async for piece in pieces]) > 1
            assert fleet.log == ["+a", "-a lost", "+b", "-b"]

    asyncio.run(run())


def test_a_reader_that_leaves_frees_the_engine() -> None:
    async def run() -> None:
        async with tiny_member("a") as a:
            fleet = Fleet(a)
            pieces = relay(ask("r", "Once", 400), fleet.take, fleet.release)
            await anext(pieces)
            await pieces.aclose()
            assert fleet.log == ["+a", "-a"]
            while a.engine.load().aborted == 0:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def byte_tokenizer() -> ModelTokenizer:
    """One token a byte: most places of a text are inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return ModelTokenizer(inner)


@pytest.mark.parametrize("text", ["a日本b語é", "🎉🎉", "plain"])
def test_resuming_inside_a_character(text: str) -> None:
    """Wherever an engine stops, what was sent and what follows are the text, once."""
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(text)
    for cut in range(1, len(tokens) + 1):
        before = Detokenizer(tokenizer)
        sent = "".join(before.push(token)[0] for token in tokens[:cut])
        keep, skip = resume_at(tokenizer, tokens[:cut], sent)
        after = Detokenizer(tokenizer)
        rest = "".join(after.push(token)[0] for token in tokens[keep:])
        assert sent + rest[skip:] == text
