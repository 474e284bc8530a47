"""The workloads of `lmdeploy_e2e.py`: what is sent when, and what is measured of the answers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define, evolve, field, frozen

__all__ = ["KERNELS_WARM_UP", "ROWS", "WARM_UP", "Answered", "Client", "Row", "Run"]

Ids = list[int]
Tokens = Mapping[str, Ids]
"""Answers by name."""

AGENT_TURNS = ((15678, 175), (15874, 153), (16056, 133), (16606, 261), (16900, 176), (24809, 427))
"""Prompt and answer tokens of the first turns of a coding agent's session: `trace_0014` of
callanjfox/kv-cache-tester (94f6046d, Apache-2.0). Each prompt repeats the session so far."""
AGENT_SYSTEM = 14336
"""Leading tokens that sessions of the same agent share: an assumption, the trace has one session."""


@frozen
class Answered:
    """One request. Times in seconds since it was sent; `name` is the same in every configuration."""

    name: str
    first: float
    last: float
    tokens: Ids


class Client:
    """Sends requests of token ids to one LMDeploy engine; greedy, answers of a given length."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._session = 0
        self.rng = np.random.default_rng()
        """Seeded by each row, so that a row is the same whatever ran before it."""
        self.repetition = 0
        """Of the row: each has prompts of its own, so that none is in the cache."""

    def ids(self, count: int) -> Ids:
        """Random token ids."""
        found: Ids = self.rng.integers(1000, 150_000, count).tolist()
        return found

    async def logits(self, prompt: Ids) -> dict[int, float]:
        """The largest logits of the token after a prompt. The engine's `logprobs_mode` is raw_logits."""
        from lmdeploy.messages import GenerationConfig

        self._session += 1
        session = self._session
        config = GenerationConfig(max_new_tokens=1, top_k=1, ignore_eos=True, logprobs=50)
        instance = self._engine.create_instance()
        found: dict[int, float] = {}
        async for out in instance.async_stream_infer(session, prompt, gen_config=config):
            for entry in out.logprobs or ():
                found.update(entry)
        await instance.async_end(session)
        return found

    async def ask(self, name: str, prompt: Ids, new: int) -> Answered:
        """One request, from sending to its last token."""
        from lmdeploy.messages import GenerationConfig

        self._session += 1
        session = self._session
        config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, top_k=1, ignore_eos=True)
        instance = self._engine.create_instance()
        tokens: Ids = []
        began = time.perf_counter()
        first = last = 0.0
        async for out in instance.async_stream_infer(session, prompt, gen_config=config):
            if len(out.token_ids):
                last = time.perf_counter() - began
                first = first or last
                tokens += [int(token) for token in out.token_ids]
        await instance.async_end(session)
        return Answered(name, first, last, tokens)


@define
class Run:
    """What a workload gave."""

    wall: float
    answers: list[Answered] = field(factory=list)

    def figures(self) -> dict[str, float]:
        """Times in seconds, TPOT in milliseconds."""
        firsts = np.array([answer.first for answer in self.answers])
        steps = [
            (answer.last - answer.first) / max(len(answer.tokens) - 1, 1) for answer in self.answers
        ]
        tokens = sum(len(answer.tokens) for answer in self.answers)
        return {
            "requests": len(self.answers),
            "wall_s": round(self.wall, 3),
            "ttft_mean_s": round(float(firsts.mean()), 4),
            "ttft_p99_s": round(float(np.percentile(firsts, 99)), 4),
            "tpot_mean_ms": round(float(np.mean(steps)) * 1e3, 3),
            "output_tok_s": round(tokens / self.wall, 1),
        }


@frozen
class Row:
    """A workload: prepared (random prompts), then run and timed. Rows of a seed have equal prompts."""

    name: str
    seed: int
    make: Callable[[Client], Callable[[Client], Awaitable[list[Answered]]]]
    prompts: Callable[[Client], Sequence[Ids]] | None = None
    """Of rows whose prompts are known beforehand, by name (0, 1, ...)."""
    before: Callable[[Client], Ids] | None = None
    """What is asked before the clock starts, so that it is in the cache whatever ran before."""

    async def run(self, client: Client, repetition: int = 0) -> Run:
        """Run it once."""
        client.rng = np.random.default_rng((self.seed, repetition))
        client.repetition = repetition
        if self.before is not None:
            await client.ask("before", self.before(client), 2)
        work = self.make(client)
        began = time.perf_counter()
        answers = await work(client)
        return Run(time.perf_counter() - began, answers)

    async def judge(self, client: Client, mine: Tokens, other: Tokens) -> dict[str, float]:
        """Whether differing answers differ at near ties: this engine's logits where they part.

        At most 64 answers are looked at. `ties` are those where the two tokens' logits are within
        an eighth: four steps of bf16 at the size that the largest logits have here.
        """
        assert self.prompts is not None
        client.rng = np.random.default_rng((self.seed, 0))
        client.repetition = 0
        gaps: list[float] = []
        for at, prompt in enumerate(self.prompts(client)):
            pair = list(zip(mine[str(at)], other[str(at)], strict=False))
            part = next((place for place, (a, b) in enumerate(pair) if a != b), None)
            if part is not None and len(gaps) < 64:
                logits = await client.logits(prompt + mine[str(at)][:part])
                a, b = (logits.get(token, -np.inf) for token in pair[part])
                gaps.append(abs(a - b) if np.isfinite(a + b) else np.inf)
        if not gaps:
            return {"looked_at": 0}
        return {
            "looked_at": len(gaps),
            "ties": sum(gap <= 0.125 for gap in gaps),
            "median_gap": float(np.median(gaps)),
            "largest_gap": float(max(gaps)),
        }


def _at_once(
    name: str,
    seed: int,
    prompts: Callable[[Client], Sequence[Ids]],
    new: int,
    pause: float = 0.0,
) -> Row:
    """All requests are sent at once; with a pause, in two halves."""

    def make(client: Client) -> Callable[[Client], Awaitable[list[Answered]]]:
        ready = prompts(client)

        async def work(client: Client) -> list[Answered]:
            async def later(number: int) -> Answered:
                await asyncio.sleep(pause if 2 * number >= len(ready) else 0.0)
                return await client.ask(str(number), ready[number], new)

            return list(await asyncio.gather(*(later(at) for at in range(len(ready)))))

        return work

    return Row(name, seed, make, prompts)


def _unshared(name: str, seed: int, new: int, pause: float = 0.0) -> Row:
    return _at_once(name, seed, lambda client: [client.ids(1024) for _ in range(64)], new, pause)


def _shared(
    name: str, seed: int, prefix: int, count: int, new: int = 128, *, cold: bool = True
) -> Row:
    """Requests of one prefix and 128 tokens of their own. The prefix is of a length and count; when
    repeated, a cold row takes another one."""

    def start(client: Client) -> Ids:
        rng = np.random.default_rng((prefix, count, client.repetition if cold else 0))
        found: Ids = rng.integers(1000, 150_000, prefix).tolist()
        return found

    def prompts(client: Client) -> Sequence[Ids]:
        shared = start(client)
        return [shared + client.ids(128) for _ in range(count)]

    row = _at_once(name, seed, prompts, new)
    return row if cold else evolve(row, before=start)


def _mixed(count: int, rate: float, new: int) -> Any:
    """Poisson arrivals: every second request asks about one of four documents of 4096 tokens."""

    def make(client: Client) -> Callable[[Client], Awaitable[list[Answered]]]:
        documents = [client.ids(4096) for _ in range(4)]
        prompts = [
            documents[at // 2 % 4] + client.ids(128) if at % 2 else client.ids(1024)
            for at in range(count)
        ]
        at = np.cumsum(client.rng.exponential(1 / rate, count))

        async def work(client: Client) -> list[Answered]:
            async def later(number: int) -> Answered:
                await asyncio.sleep(float(at[number]))
                return await client.ask(str(number), prompts[number], new)

            return list(await asyncio.gather(*(later(number) for number in range(count))))

        return work

    return make


def _agents(sessions: int, turns: Sequence[tuple[int, int]], system: int) -> Any:
    """Sessions of one agent, a second apart by sixteens; each turn follows the answer before it."""

    def make(client: Client) -> Callable[[Client], Awaitable[list[Answered]]]:
        shared = client.ids(system)
        own = [client.ids(turns[-1][0]) for _ in range(sessions)]

        async def work(client: Client) -> list[Answered]:
            async def session(number: int) -> list[Answered]:
                await asyncio.sleep(number / 16)
                history, fresh, done = list(shared), iter(own[number]), []
                for turn, (length, new) in enumerate(turns):
                    history += [next(fresh) for _ in range(length - len(history))]
                    answer = await client.ask(f"{number}.{turn}", list(history), new)
                    history += answer.tokens
                    done.append(answer)
                return done

            every = await asyncio.gather(*(session(number) for number in range(sessions)))
            return [answer for done in every for answer in done]

        return work

    return make


ROWS = (
    _unshared("64 x 1024, nothing shared", 1, 128),
    _shared("64 x (8192 shared + 128), cold", 2, 8192, 64),
    _shared("64 x (8192 + 128), again", 3, 8192, 64, cold=False),
    _shared("256 x (8192 shared + 128), cold", 4, 8192, 256),
    _shared("256 x (8192 + 128), again", 5, 8192, 256, cold=False),
    _shared("128 x (32768 shared + 128), cold", 6, 32768, 128),
    _shared("128 x (32768 + 128), again", 7, 32768, 128, cold=False),
    Row("mixed, Poisson 16/s", 8, _mixed(128, 16.0, 128)),
    Row("agents, 16 sessions x 6 turns", 9, _agents(16, AGENT_TURNS, AGENT_SYSTEM)),
    _unshared("64 x 1024, the first row's prompts in halves", 1, 128, pause=0.3),
)
"""The rows of the table."""
WARM_UP = (
    _unshared("warm-up", 10, 16),
    _shared("warm-up", 11, 2048, 16, 16),
    _shared("warm-up", 12, 2048, 16, 16),
)
"""Compiles what rows would compile in their measured time."""
KERNELS_WARM_UP = tuple(
    _shared("warm-up", 13 + at, prefix, count, 20)
    for at, (prefix, count) in enumerate(((8000, 64), (8000, 256), (30000, 128), (8000, 16)))
)
"""The same for our kernels: a CUDA graph for each batch size and tile height."""
