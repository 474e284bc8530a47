"""The load of `serve.py`: shared-document chats, many clients that stream, and what they measure.

Definitions are those of vLLM's `vllm bench serve`, whose method this follows (closed loop, as with its
`--max-concurrency`): TTFT is from sending a request to its first content; TPOT is the time from the
first content to the last, for each token after the first; ITL is between two chunks of content.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from attrs import define, field, frozen
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

__all__ = ["Chat", "Load", "Sample", "chats", "percentile", "run_load"]

CONSONANTS, VOWELS = "bcdfghklmnprstvz", "aeiou"


@frozen
class Chat:
    """One conversation: a document, and questions that are asked one after the other."""

    document: str
    questions: tuple[str, ...]
    new: int
    """Tokens of each answer, at most."""
    leave_after: int | None = None
    """Chunks after which the client hangs up; None: it stays."""


@define
class Sample:
    """One request. Times are seconds of `time.perf_counter`."""

    sent: float
    first: float | None = None
    last: float | None = None
    gaps: list[float] = field(factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    error: str = ""
    left: bool = False
    """The client hung up, as planned."""


@frozen
class Load:
    """A whole run."""

    samples: Sequence[Sample]
    seconds: float

    def summary(self) -> dict[str, float]:
        """What is reported; times in milliseconds, rates per second."""
        good = [s for s in self.samples if not s.error and not s.left]
        first = [1e3 * (s.first - s.sent) for s in good if s.first is not None]
        each = [
            1e3 * (s.last - s.first) / (s.new_tokens - 1)
            for s in good
            if s.first is not None and s.last is not None and s.new_tokens > 1
        ]
        gaps = [1e3 * gap for s in good for gap in s.gaps]
        prompt = sum(s.prompt_tokens for s in good)
        return {
            "requests": len(self.samples),
            "errors": sum(bool(s.error) for s in self.samples),
            "left": sum(s.left for s in self.samples),
            "seconds": self.seconds,
            "requests_per_second": len(good) / self.seconds,
            "new_tokens_per_second": sum(s.new_tokens for s in good) / self.seconds,
            "prompt_tokens": prompt,
            "cached_share": sum(s.cached_tokens for s in good) / max(1, prompt),
            "ttft_mean": fmean(first) if first else 0.0,
            "ttft_p50": percentile(first, 50),
            "ttft_p99": percentile(first, 99),
            "tpot_p50": percentile(each, 50),
            "tpot_p99": percentile(each, 99),
            "itl_p99": percentile(gaps, 99),
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation, as numpy's default; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def chats(
    count: int, *, documents: int, words: int, turns: int, new: int, seed: int, leaving: float = 0.0
) -> list[Chat]:
    """`count` conversations about `documents` random texts of `words` words each.

    A share `leaving` of the clients hang up in the middle of their answer.
    """
    rng = random.Random(seed)
    texts = [_text(rng, words) for _ in range(documents)]
    made = []
    for number in range(count):
        questions = tuple(f"What about {_text(rng, 6)}?" for _ in range(turns))
        leave = rng.randrange(1, max(2, new // 2)) if rng.random() < leaving else None
        made.append(Chat(texts[number % documents], questions, new, leave))
    return made


def _text(rng: random.Random, words: int) -> str:
    return " ".join(
        "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3)))
        for _ in range(words)
    )


async def run_load(url: str, model: str, work: Sequence[Chat], clients: int) -> Load:
    """`clients` at a time take a conversation each, until none is left."""
    waiting = list(reversed(work))
    samples: list[Sample] = []
    async with (
        DefaultAsyncHttpxClient(timeout=600.0) as http,
        AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http
        ) as client,
    ):

        async def one() -> None:
            while waiting:
                await _converse(client, model, waiting.pop(), samples)

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return Load(samples, time.perf_counter() - began)


async def _converse(client: AsyncOpenAI, model: str, chat: Chat, samples: list[Sample]) -> None:
    messages: list[Any] = [{"role": "system", "content": chat.document}]
    for question in chat.questions:
        messages.append({"role": "user", "content": question})
        sample = Sample(time.perf_counter())
        samples.append(sample)
        try:
            await _ask(client, model, messages, chat, sample)
        except OpenAIError as error:
            sample.error = f"{type(error).__name__}: {error}"
            return
        if sample.left:
            return
        messages.append({"role": "assistant", "content": sample.text})


async def _ask(
    client: AsyncOpenAI, model: str, messages: list[Any], chat: Chat, sample: Sample
) -> None:
    stream = await client.chat.completions.create(
        model=model,
        messages=messages,
        max_completion_tokens=chat.new,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = 0
    async with stream:
        async for chunk in stream:
            if chunk.usage is not None:
                _usage(chunk.usage, sample)
            if not chunk.choices or not chunk.choices[0].delta.content:
                continue
            now = time.perf_counter()
            if sample.last is not None:
                sample.gaps.append(now - sample.last)
            sample.first = sample.first or now
            sample.last = now
            sample.text += chunk.choices[0].delta.content
            chunks += 1
            if chat.leave_after is not None and chunks >= chat.leave_after:
                sample.left = True
                return


def _usage(usage: Any, sample: Sample) -> None:
    sample.prompt_tokens, sample.new_tokens = usage.prompt_tokens, usage.completion_tokens
    details = usage.prompt_tokens_details
    sample.cached_tokens = (details.cached_tokens or 0) if details else 0
