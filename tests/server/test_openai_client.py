"""The contract: the official `openai` client against a real server with a tiny random model."""

import asyncio
import time
from collections.abc import Callable, Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionStreamOptionsParam

from tests.embedded.tiny import oracle
from tests.server.serving import Served
from tests.server.tiny import tiny_model

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is KV?"}]


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def expected(prompt: str, new: int) -> list[int]:
    """Plain greedy decoding of a text, up to the end token."""
    model = tiny_model()
    assert model.tokenizer is not None
    tokens = oracle(model, model.tokenizer.encode(prompt), new)
    return tokens[: tokens.index(256)] if 256 in tokens else tokens


def text(tokens: list[int]) -> str:
    tokenizer = tiny_model().tokenizer
    assert tokenizer is not None
    return tokenizer.decode(tokens)


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        client.models.retrieve("gpt-9")


def test_a_chat_is_answered_as_plain_decoding_does(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=12)
    prompt = "<user>What is KV?\n<assistant>"
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == text(expected(prompt, 12))
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(prompt) + 12


def test_a_repeated_prompt_is_counted_as_cached(client: OpenAI) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 2
    found = []
    for _ in range(2):
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        found.append(usage.prompt_tokens_details.cached_tokens)
    assert found == [0, (len(prompt) - 1) // 4 * 4]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_gives_the_same_text_and_usage_only_when_asked(
    client: OpenAI, usage: bool
) -> None:
    whole = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=16)
    wanted: ChatCompletionStreamOptionsParam = {"include_usage": True}
    stream = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=16,
        stream=True,
        stream_options=wanted if usage else openai.omit,
    )
    chunks = list(stream)
    tails = [chunk for chunk in chunks if not chunk.choices]
    assert len(tails) == usage
    if usage:
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    said = "".join(choice.delta.content or "" for choice in choices)
    assert said == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_of_several_prompts_with_several_answers(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["one", "two!"], n=2, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[:2] == [text(expected("one", 5))] * 2
    assert texts[2:] == [text(expected("two!", 5))] * 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("one") + len("two!")
    chunks = client.completions.create(
        model="tiny", prompt=["one", "two!"], n=2, max_tokens=5, stream=True
    )
    streamed = ["", "", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_token_ids_are_a_prompt(client: OpenAI) -> None:
    tokenizer = tiny_model().tokenizer
    assert tokenizer is not None
    ids = list(tokenizer.encode("tokens"))
    as_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=5)
    as_text = client.completions.create(model="tiny", prompt="tokens", max_tokens=5)
    assert as_ids.choices[0].text == as_text.choices[0].text


def test_a_stop_string_ends_an_answer_before_it(client: OpenAI) -> None:
    prompt = "stop here"
    whole = client.completions.create(model="tiny", prompt=prompt, max_tokens=30)
    stop = whole.choices[0].text[4:6]
    for streamed in (False, True):
        if streamed:
            chunks = list(
                client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=30, stop=[stop], stream=True
                )
            )
            said = "".join(chunk.choices[0].text for chunk in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            answer = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=30, stop=stop
            )
            said, finish = answer.choices[0].text, answer.choices[0].finish_reason
        assert said == whole.choices[0].text.partition(stop)[0]
        assert finish == "stop"


def test_a_seed_repeats_a_draw_and_answers_differ(client: OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt="dice", temperature=1.0, seed=seed, n=3, max_tokens=20
        )
        return [choice.text for choice in answer.choices]

    first = draw(7)
    assert draw(7) == first
    assert len({*first}) == 3
    assert draw(1234) != first


def test_logprobs_are_those_of_the_model(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for entry in logprobs.content:
        # Greedy: the token is the likeliest one.
        assert entry.top_logprobs[0].logprob == entry.logprob
        likelihoods = [top.logprob for top in entry.top_logprobs]
        assert likelihoods == sorted(likelihoods, reverse=True)
        assert likelihoods[0] < 0
    old = client.completions.create(model="tiny", prompt="x", max_tokens=4, logprobs=2)
    parts = old.choices[0].logprobs
    assert parts is not None
    assert parts.token_logprobs is not None
    assert len(parts.token_logprobs) == 4
    assert client.chat.completions.create(model="tiny", messages=ASK).choices[0].logprobs is None


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens") as caught:
        client.chat.completions.create(model="tiny", messages=ASK, max_tokens=0)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 1020, max_tokens=10)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="x", encoding_format="float")
    with pytest.raises(openai.BadRequestError, match="tools: it is not supported"):
        client.chat.completions.create(
            model="tiny",
            messages=ASK,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
        client.chat.completions.create(model="tiny", messages=ASK, extra_body={"temprature": 1})


def test_ids_are_carried_through(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=ASK,
        max_tokens=1,
        extra_headers={"X-Request-ID": "my-id", "X-Trace-ID": "my-trace"},
    )
    assert raw.headers["x-request-id"] == "my-id"
    assert raw.headers["x-trace-id"] == "my-trace"
    assert raw.parse().id == "chatcmpl-my-id"


def test_leaving_a_stream_frees_its_blocks(client: OpenAI, served: Served) -> None:
    aborted = served.engine.load().aborted
    stream = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=900, stream=True)
    for chunk, _ in zip(stream, range(4), strict=False):
        assert chunk.choices
    stream.close()
    wait_for(lambda: served.engine.load().aborted == aborted + 1, served)
    wait_for(lambda: served.engine.load().kv_used_blocks == 0, served)


def test_the_async_client_runs_many_at_once_and_can_cancel(served: Served) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
            whole = await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20)

            async def streamed() -> str:
                said = ""
                async for chunk in await client.chat.completions.create(
                    model="tiny", messages=ASK, max_tokens=20, stream=True
                ):
                    said += chunk.choices[0].delta.content or ""
                return said

            answers = await asyncio.gather(*(streamed() for _ in range(16)))
            assert {*answers} == {whole.choices[0].message.content}

            aborted = served.engine.load().aborted
            task = asyncio.create_task(
                client.completions.create(model="tiny", prompt="gone", max_tokens=900)
            )
            while not served.engine.load().running:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(500):
                if served.engine.load().aborted > aborted:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("the request goes on without its client")

    asyncio.run(main())


def wait_for(condition: Callable[[], bool], served: Served) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"it does not happen: {served.engine.load()}")
