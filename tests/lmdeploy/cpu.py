"""The genuine Engine, Scheduler, block manager and trie of LMDeploy on a CPU.

Only the executor is ours: it records what it is asked to run and answers with a token that depends on
the sequence alone. Works on the stock and on the patched tree.
"""

import asyncio
import logging
import types
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import lmdeploy.pytorch.engine.engine as engine_module
import numpy as np
import torch
from lmdeploy.messages import GenerationConfig, PytorchEngineConfig, ResponseType
from lmdeploy.pytorch.config import CacheConfig, ModelConfig, SchedulerConfig
from lmdeploy.pytorch.engine.model_agent import BatchedOutputs
from lmdeploy.pytorch.messages import MessageStatus, SequenceMeta, UpdateTokenMode
from lmdeploy.pytorch.paging.scheduler import Scheduler
from lmdeploy.pytorch.strategies.ar.sequence import ARSequenceStrategy

T = TypeVar("T")
BLOCK = 16


def scheduler(
    blocks: int = 64,
    batch: int = 8,
    tokens: int = 4096,
    host: int = 0,
    prefix: bool = True,
) -> Any:
    """A scheduler over `blocks` device and `host` host blocks of 16 tokens."""
    cache = CacheConfig(
        max_batches=batch,
        block_size=BLOCK,
        num_cpu_blocks=host,
        num_gpu_blocks=blocks,
        enable_prefix_caching=prefix,
        max_prefill_token_num=tokens,
    )
    config = SchedulerConfig(max_batches=batch, max_session_len=10**6)
    return Scheduler(config, cache, SequenceMeta(BLOCK, strategy=ARSequenceStrategy()))


def add(sched: Any, session: int, tokens: Sequence[int]) -> Any:
    """A waiting sequence. Arrival times count up: the clock is too coarse to order a fast test."""
    seq = sched.add_session(session).add_sequence(np.array(tokens))
    sched.add_sequence(seq)
    seq.arrive_time = float(session)
    return seq


def prefill(sched: Any, token: int = 7) -> list[Any]:
    """Schedule a prefill and answer it; the sequences it ran."""
    ran = sched.schedule(True).running
    _answer(sched, ran, token, UpdateTokenMode.PREFILL)
    return list(ran)


def decode(sched: Any, token: int = 8, prealloc: int = 1) -> list[Any]:
    """Schedule one decode and answer it; the sequences it ran."""
    ran = sched.schedule(False, prealloc).running
    _answer(sched, ran, token, UpdateTokenMode.DECODE)
    return list(ran)


def _answer(sched: Any, seqs: Sequence[Any], token: int, mode: Any) -> None:
    sched.lock_running(seqs)
    for seq in seqs:
        seq.update_token_ids(np.array([token]), mode=mode)
    sched.unlock_running(seqs)


def stop(*seqs: Any) -> None:
    """End the answers; the sessions keep their blocks."""
    for seq in seqs:
        seq.status = MessageStatus.STOPPED


def next_turn(seq: Any, tokens: Sequence[int]) -> None:
    """Put more input after a stopped answer."""
    arrived = seq.arrive_time
    seq.update_token_ids(np.array(tokens), mode=UpdateTokenMode.INPUTS)
    seq.arrive_time = arrived + 1000
    seq.status = MessageStatus.WAITING


def blocks_of(seq: Any) -> list[int]:
    """The logical blocks of a sequence."""
    return [int(block) for block in seq.logical_blocks.get_real_blocks()]


def next_token(context: np.ndarray) -> int:
    """The token after a context: every token and its place matter."""
    return int((context * np.arange(1, len(context) + 1)).sum() % 983 + 10)


def oracle(prompt: Sequence[int], new: int) -> list[int]:
    """The only right answer to a prompt."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(np.array(tokens)))
    return tokens[len(prompt) :]


class FakeExecutor:
    """Runs forwards on a KV memory that holds token ids, and keeps a record of them.

    Each forward writes its tokens where the block tables say, of all rows first, and then answers each
    row from what its table holds. So a wrong table, a block not yet computed, or a lost copy gives a
    wrong answer.
    """

    device_type = "cpu"

    def __init__(
        self,
        model_path: str,
        cache_config: Any,
        misc_config: Any,
        answer: Callable[[np.ndarray], int],
        **_: Any,
    ) -> None:
        self.answer = answer
        self.cache_config, self.misc_config = cache_config, misc_config
        self.model_config = ModelConfig(
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=[2],
            head_dim=16,
            vocab_size=1000,
        )
        cache_config.window_size = -1
        self.device = np.full((cache_config.num_gpu_blocks, cache_config.block_size), -1)
        self.host = np.full((cache_config.num_cpu_blocks, cache_config.block_size), -1)
        self.trace: list[dict[str, Any]] = []
        self.on_forward: Callable[[], None] = lambda: None
        self.inputs: asyncio.Queue[Any] = asyncio.Queue()
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()

    def init(self) -> None: ...
    def release(self) -> None: ...
    def get_input_processor(self) -> None: ...

    def start(self, forward_event: Any) -> None:
        self.task = asyncio.get_event_loop().create_task(self._run())

    def stop(self) -> None:
        self.task.cancel()

    async def forward_async(self, inputs: dict[str, Any]) -> None:
        model = inputs["inputs"]
        said = getattr(model, "prefix_groups", None)
        self.trace.append(
            {
                "decode": bool(model.is_decoding),
                "tokens": model.seq_length.tolist(),
                "history": (model.history_lengths + (inputs.get("follows") is not None)).tolist(),
                "follows": inputs.get("follows") is not None,
                "loops": inputs["loop_count"],
                "blocks": model.block_offsets.tolist(),
                "groups": [] if said is None else said.groups.tolist(),
                "total": [] if said is None else said.total.tolist(),
                "swaps": [dict(inputs["swap_in_map"]), dict(inputs["swap_out_map"])],
            }
        )
        self.on_forward()
        self.inputs.put_nowait(inputs)
        await asyncio.sleep(0)

    async def get_output_async(self) -> Any:
        return await self.outputs.get()

    async def _run(self) -> None:
        token = torch.empty(0)
        while True:
            forward = await self.inputs.get()
            model, criteria = forward["inputs"], forward["stopping_criteria"]
            for block, to in forward["swap_out_map"].items():
                self.host[to] = self.device[block]
            for block, to in forward["swap_in_map"].items():
                self.device[to] = self.host[block]
            tables = model.block_offsets.numpy()
            starts = model.history_lengths.numpy().copy()
            rows = np.split(model.input_ids[0].numpy(), np.cumsum(model.seq_length.numpy())[:-1])
            words = forward["sampling_inputs"].stop_words
            if (follows := forward.get("follows")) is not None:  # as the model agent does
                token = token[follows]
                starts += 1
                rows = list(token.numpy()[:, None])
                *_, criteria = criteria.step(token, words)
            for _ in range(forward["loop_count"]):
                await asyncio.sleep(0)
                token = torch.from_numpy(self._forward(tables, starts, rows))
                starts += [len(row) for row in rows]
                rows = list(token.numpy()[:, None])
                stopped, position, criteria = criteria.step(token, words)
                out = BatchedOutputs(next_token_ids=token, stopped=stopped, stop_pos=position)
                out.new_token_timestamp = 0.0
                self.outputs.put_nowait(out)

    def _forward(self, tables: Any, starts: Any, rows: Sequence[Any]) -> np.ndarray:
        size = self.cache_config.block_size
        for table, start, row in zip(tables, starts, rows, strict=True):
            at = np.arange(start, start + len(row))
            self.device[table[at // size], at % size] = row
        answers = []
        for table, start, row in zip(tables, starts, rows, strict=True):
            at = np.arange(start + len(row))
            answers.append(self.answer(self.device[table[at // size], at % size]))
        return np.array(answers)


def engine(answer: Callable[[np.ndarray], int] = next_token, /, **config: Any) -> Any:
    """The genuine engine over a `FakeExecutor`, with 16-token blocks and prefix caching.

    Args:
        answer: the token after a context.
        config: of `PytorchEngineConfig`.
    """
    defaults = {"block_size": BLOCK, "enable_prefix_caching": True, "session_len": 8192}
    defaults |= {"max_batch_size": 16, "num_gpu_blocks": 256, "max_prefill_token_num": 4096}
    engine_module.build_executor = lambda path, **options: FakeExecutor(
        path, answer=answer, **options
    )
    engine_module.EngineChecker = lambda **_: types.SimpleNamespace(handle=lambda: None)
    return engine_module.Engine(".", PytorchEngineConfig(**{**defaults, **config}))


async def ask(
    eng: Any, session: int, tokens: Sequence[int], new: int, end: bool = True
) -> list[int]:
    """Send one request; the tokens of its answer. Raises RuntimeError when the engine gives up."""
    instance = eng.create_instance()
    config = GenerationConfig(max_new_tokens=new, ignore_eos=True)
    answer: list[int] = []
    async for out in instance.async_stream_infer(session, list(tokens), gen_config=config):
        if out.status not in (ResponseType.SUCCESS, ResponseType.FINISH):
            raise RuntimeError(out.status.name)
        answer += [int(token) for token in out.token_ids]
    if end:
        await instance.async_end(session)
    return answer


def run(work: Callable[[], Awaitable[T]], timeout: float = 20.0) -> T:
    """Run a coroutine in a loop of its own; the engine's tasks in it end with it."""

    async def bounded() -> T:
        return await asyncio.wait_for(work(), timeout)

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(bounded())
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()


torch.set_num_threads(1)
logging.getLogger("lmdeploy").setLevel(logging.ERROR)
