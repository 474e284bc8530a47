"""vLLM's asynchronous worker under plans, on a CPU: its GPU streams are stand-ins that have always caught up.

So a forward is over before the next one is asked for, but vLLM's core and worker do what they do on a
GPU: the core asks for it before it has seen the tokens, and the worker keeps them to itself.
"""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from vllm import LLM, SamplingParams
from vllm.platforms.cpu import CpuPlatform

from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.plan import PlanStep
from sagellm_ir.presets import load_target
from sagellm_ir.request import Request
from sagellm_ir.runtime import SageLLMEngine
from sagellm_ir.runtime.engines import LoadedBackend, load_backend
from sagellm_ir.runtime.engines.answers import EngineDraining, Response, StreamDelta
from sagellm_ir.runtime.engines.simulator import SimulatorEngine
from sagellm_ir.runtime.engines.vllm.load import _environment, engine_settings
from sagellm_ir.runtime.running import run_plan
from sagellm_ir.runtime.trace import Trace, differences
from tests.vllm.fixtures import FRONT, SAMPLED, theirs, tokens
from tests.vllm.real import OVERRIDES, settings, tokens_of, workload


class _CaughtUp:
    """A stream, and an event."""

    def __init__(self, **_: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: "_CaughtUp") -> None:
        """Nothing is behind."""

    def record(self) -> None:
        """All is done."""

    def synchronize(self) -> None:
        """All is done."""


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's asynchronous worker wants of CUDA, and its choice left alone on a CPU."""
    monkeypatch.setattr(torch.cuda, "Stream", _CaughtUp)
    monkeypatch.setattr(torch.cuda, "Event", _CaughtUp)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: _CaughtUp())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    plain = CpuPlatform.check_and_update_config

    def check(config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        plain(config)
        config.scheduler_config.async_scheduling = wanted

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check))


def planned(folder: Path) -> LLM:
    """An engine by vLLM's own entry point, planned online."""
    ours = engine_settings(folder, load_target("vllm-cpu", **OVERRIDES), "float32")
    more = {key: ours[key] for key in ("scheduler_cls", "kv_transfer_config")}
    more |= {"max_num_seqs": 3, "max_num_batched_tokens": 96}
    blocks = {"num_gpu_blocks_override": ours["num_gpu_blocks_override"]}
    with _environment():
        return LLM(**settings(folder, **more, **blocks, max_model_len=ours["max_model_len"]))


def test_answers_are_default_vllms(streams: None, folder: Path, expected: dict[str, Any]) -> None:
    """With a pool too small for all, so that blocks are spilled and fetched, and stop tokens in some."""
    requests = workload()
    stops = {
        r.id: whole[len(whole) // 2]
        for r in requests[::3]
        if (whole := list(expected[r.id].token_ids))
    }
    engine = planned(folder)
    assert engine.llm_engine.vllm_config.scheduler_config.async_scheduling
    core = engine.llm_engine.engine_core
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=r.max_new_tokens,
            ignore_eos=True,
            stop_token_ids=[stops[r.id]] if r.id in stops else [],
        )
        for r in requests
    ]
    prompts = [{"prompt_token_ids": list(tokens_of(r))} for r in requests]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    stats = core.engine_core.scheduler.stats
    core.shutdown()
    for request, output in zip(requests, outputs, strict=True):
        whole = list(expected[request.id].token_ids)
        if request.id in stops:
            whole = whole[: whole.index(stops[request.id]) + 1]
        assert list(output.outputs[0].token_ids) == whole
    assert stats.prefill_tokens < sum(len(tokens_of(r)) for r in requests)
    assert stats.moved_blocks > 0


@pytest.fixture
def ahead(streams: None, folder: Path, expected: object) -> Iterator[LoadedBackend]:
    """An engine for ours to serve, whose pool is too small for the workload."""
    made = load_backend("vllm", str(folder), overrides=OVERRIDES)
    yield made
    made.backend.close()  # type: ignore[attr-defined]


def test_served(
    ahead: LoadedBackend,
    asked: list[tuple[Request, SamplingParams]],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """End tokens, stop strings, draws, likelihoods, an abort in mid-answer: as default vLLM, and the
    next step is planned while one runs."""
    backend: Any = ahead.backend
    assert backend.depth == 2
    overlaps, begin = [], backend.begin

    def noting(step: PlanStep) -> None:
        overlaps.append(backend.scheduler.asked > backend.scheduler.answered)
        begin(step)

    monkeypatch.setattr(backend, "begin", noting)
    engine = SageLLMEngine(ahead)
    engine.start()

    async def leave(request: Request) -> list[int]:
        """Ask, and go away after three tokens."""
        made = []
        async with aclosing(engine.stream(request)) as events:
            async for event in events:
                if isinstance(event, StreamDelta):
                    made.append(event.token)
                if len(made) == 3:
                    break
        return made

    async def later(request: Request, seconds: float) -> Response:
        await asyncio.sleep(seconds)
        return await engine.execute(request)

    async def main() -> tuple[list[Response], list[int]]:
        gone = evolve(asked[0][0], id="gone", max_new_tokens=40)
        left = asyncio.create_task(leave(gone))
        requests = {request.id: request for request, _ in asked}
        alone = requests.pop("seeded")  # vLLM 0.27 loses seeds in mixed batches
        answers = await asyncio.gather(
            *(later(request, 0.05 * at) for at, request in enumerate(requests.values()))
        )
        answers.append(await engine.execute(alone))
        assert await engine.drain(seconds=60)
        with pytest.raises(EngineDraining):
            await engine.execute(gone)
        for _ in range(500):  # until the engine's thread has looked again
            if not engine.load().kv_used_blocks:
                break
            await asyncio.sleep(0.01)
        return answers, await left

    answers, cut = asyncio.run(main())
    engine.stop()
    for response in answers:
        want = expected[response.request_id]
        assert list(response.tokens) == list(want.token_ids), response.request_id
        if response.request_id in SAMPLED:
            assert (response.text, response.finish) == (want.text, want.finish_reason)
    assert cut == list(expected[asked[0][0].id].token_ids)[:3]
    assert overlaps.count(True) > len(overlaps) / 2
    assert backend.scheduler.asked == backend.scheduler.answered
    assert engine.load().kv_used_blocks == 0
    assert sum(response.cached_tokens for response in answers) > 0
    assert backend.stats().moved_blocks > 0


def test_a_plan_is_run_a_step_at_a_time(ahead: LoadedBackend, expected: dict[str, Any]) -> None:
    """And its trace is exact."""
    backend: Any = ahead.backend
    backend._stop_at_eos = False
    plan = compile_requests(
        workload(), ahead.target, f"{FRONT},evict{{policy=lru, spill=always}}"
    ).plan
    traces = []
    for engine in (backend, SimulatorEngine(plan.target)):
        engine.trace = Trace(engine.capability.engine, plan.target.block_size)
        report = run_plan(engine, plan)
        traces.append(engine.trace)
        if engine is backend:
            assert tokens(report) == theirs(expected, report.answers)
            assert report.moved_blocks > 0
    assert differences(*traces) == []
    assert [f.rows for f in traces[0].forwards] == [f.rows for f in traces[1].forwards]
