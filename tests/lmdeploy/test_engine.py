"""`LMDeployBackend`: plans compiled by us, run by LMDeploy's genuine engine on a CPU."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
from attrs import evolve

from sagellm_ir.build import build
from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering import lower
from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.plan import PlanRequest, PlanStep, PrefillChunk
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.request import Request, Sampling, TokenPrompt
from sagellm_ir.runtime.backend import InferenceBackend
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.answers import StreamDelta
from sagellm_ir.runtime.engines.embedded import load_tokenizer
from sagellm_ir.runtime.engines.lmdeploy import scheduler as driving
from sagellm_ir.runtime.engines.lmdeploy.engine import LMDeployBackend
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from sagellm_ir.runtime.engines.simulator import SimulatorEngine
from sagellm_ir.runtime.planner import OnlinePlanner, PlanCursor
from sagellm_ir.runtime.running import run_plan
from sagellm_ir.runtime.selftest import tight_requests
from sagellm_ir.runtime.trace import Trace, differences
from sagellm_ir.target import Tier
from tests.lmdeploy.cpu import engine, oracle

SHARED = tuple(range(100, 228))


@pytest.fixture
def backend() -> Iterator[LMDeployBackend]:
    with LMDeployBackend(engine, stop_at_eos=False) as made:
        yield made


def request(name: str, tail: int, new: int = 12) -> PlanRequest:
    tokens = (*SHARED, *[tail] * 20)
    return PlanRequest(name, max_new_tokens=new, prompt_len=len(tokens), tokens=tokens)


def right(asked: PlanRequest) -> list[int]:
    assert asked.tokens is not None
    return oracle(asked.tokens, asked.max_new_tokens)


def test_it_is_an_inference_backend(backend: LMDeployBackend) -> None:
    assert isinstance(backend, InferenceBackend)
    assert backend.capability.engine == "lmdeploy"
    assert not backend.target.mixed
    assert backend.target.block_size == 16


def test_the_online_planner_streams_right_answers(backend: LMDeployBackend) -> None:
    planner = OnlinePlanner(backend.target)
    asked = [request(f"r{i}", i) for i in range(6)]
    for one in asked[:4]:
        planner.submit(one)
        backend.submit(one)
    answers: dict[str, list[int]] = {one.id: [] for one in asked}
    ends = {}
    for event in backend.stream(planner):
        assert event.token is not None
        assert event.index == len(answers[event.request])
        answers[event.request].append(event.token)
        if event.finish:
            ends[event.request] = event.finish
        if len(answers["r0"]) == 2 and event.request == "r0":
            for late in asked[4:]:
                planner.submit(late)
                backend.submit(late)
    assert answers == {one.id: right(one) for one in asked}
    assert backend._driver.unplanned == 0
    assert set(ends.values()) == {"length"}
    stats = backend.stats()
    assert stats.prefill_tokens == 148 + 5 * 20
    assert stats.forwards > stats.steps
    for one in asked:
        backend.release(one.id)
    assert backend.view().waiting == backend.view().running == backend.view().finished == ()


def test_steps_run_one_by_one(backend: LMDeployBackend) -> None:
    one = request("r0", 5)
    backend.submit(one)
    [first] = backend.step(PlanStep(0, prefill=(PrefillChunk("r0", 0, 148),)))
    more = backend.step(PlanStep(1, decode=("r0",), loops=4))
    assert [first.token, *(event.token for event in more)] == right(one)[:5]
    assert [event.index for event in more] == [1, 2, 3, 4]
    [seen] = backend.view().running
    assert (seen.computed, seen.generated) == (152, 5)
    with pytest.raises(SageIRError, match="unknown requests"):
        backend.step(PlanStep(2, decode=("ghost",)))
    last = backend.step(PlanStep(3, decode=("r0",), loops=7))
    assert last[-1].finish == "length"
    with pytest.raises(SageIRError, match="no request is waiting or running"):
        backend.step(PlanStep(4, decode=("r0",)))


def test_a_request_can_be_aborted(backend: LMDeployBackend) -> None:
    for name in ("r0", "r1"):
        backend.submit(request(name, 5))
    backend.abort("r1")
    events = backend.step(PlanStep(0, prefill=(PrefillChunk("r0", 0, 148),)))
    backend.abort("r0")
    events += backend.stream(OnlinePlanner(backend.target))
    ends = {name: [e.finish for e in events if e.request == name] for name in ("r0", "r1")}
    assert ends == {"r0": [None, "abort"], "r1": ["abort"]}
    assert {seen.id for seen in backend.view().finished} == {"r0", "r1"}


def test_what_cannot_run_is_refused(backend: LMDeployBackend) -> None:
    backend.submit(request("r0", 1))
    with pytest.raises(SageIRError, match="was not released"):
        backend.submit(request("r0", 1))
    with pytest.raises(SageIRError, match="token ids are missing"):
        backend.submit(PlanRequest("r1", prompt_len=4))
    with pytest.raises(SageIRError, match="stop strings"):
        backend.submit(request("r2", 1), Sampling(stop=("x",)))


@pytest.mark.parametrize("host", [0, 64])
def test_a_plan_compiled_ahead_runs_with_the_cursor(host: int) -> None:
    """Twelve requests that share, through a pool too small for all at once."""

    def make() -> Any:
        return engine(num_gpu_blocks=40, num_cpu_blocks=host, max_prefill_token_num=256)

    with LMDeployBackend(make, stop_at_eos=False) as backend:
        texts = [(*SHARED[: 16 * (2 + i % 4)], *[i] * 24) for i in range(12)]
        requests = [
            Request(f"r{i}", max_new_tokens=9 + i, prompt=TokenPrompt(tokens))
            for i, tokens in enumerate(texts)
        ]
        built = build(requests, backend.target)
        graph = PassManager(Pipeline.parse("O2")).run(built.graph)
        plan = lower(graph, built.tokens)
        report = run_plan(backend, plan)
        for asked in plan.requests:
            backend.submit(asked)
        events = list(backend.stream(PlanCursor(plan)))
        assert (backend._driver.rejected, backend._driver.unplanned) == ([], 0)
    for asked in plan.requests:
        streamed = [event.token for event in events if event.request == asked.id]
        assert streamed == report.answers[asked.id].tokens
        assert asked.tokens is not None
        answer = report.answers[asked.id]
        assert answer.tokens == oracle(asked.tokens, asked.max_new_tokens)


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_runs_as_on_the_other_engines(seed: int) -> None:
    """Chunks, their order, shared blocks and decodes are those of the simulator, and no token is wrong;
    also when the engine has no more seats than the plan."""

    def make() -> Any:
        sizes = {"num_gpu_blocks": 40, "num_cpu_blocks": 64, "max_prefill_token_num": 192}
        return engine(**sizes, max_batch_size=3)

    with LMDeployBackend(make, stop_at_eos=False) as backend:
        whole = backend.target
        target = evolve(
            whole,
            max_batch=3,
            tiers=(Tier("device", 14), Tier("host", 64)),
            device=evolve(whole.device, step_overhead=1e-9),  # so that sharing pays
        )
        plan = compile_requests(
            tight_requests(random.Random(seed), target, range(10, 900)), target
        ).plan
        traces = []
        for one in (backend, SimulatorEngine(target)):
            one.trace = Trace(one.capability.engine, target.block_size)
            report = run_plan(one, plan)
            traces.append(one.trace)
            if one is backend:
                for asked in plan.requests:
                    assert report.answers[asked.id].tokens == right(asked)
        assert (backend._driver.unplanned, backend._driver.rejected) == (0, [])
        assert len(traces[0].forwards) == len(traces[1].forwards)
        assert differences(*traces) == []


def test_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come at different times are planned and answered, in tokens and text; and nothing
    waits for the pause in which LMDeploy would ask again."""
    monkeypatch.setattr(driving, "_IDLE", 1e6)
    tokenizer = load_tokenizer("smollm2-135m")
    assert tokenizer is not None

    async def work(served: SageLLMEngine) -> None:
        async def answer(number: int) -> tuple[list[int], str]:
            await asyncio.sleep(0.01 * number)
            prompt = TokenPrompt((*SHARED, *[number] * 20))
            asked = Request(f"r{number}", max_new_tokens=12, prompt=prompt)
            pieces = [piece async for piece in served.stream(asked)]
            made = [piece for piece in pieces if isinstance(piece, StreamDelta)]
            return [piece.token for piece in made], "".join(piece.text for piece in made)

        answers = await asyncio.wait_for(asyncio.gather(*map(answer, range(6))), 60)
        for number, (tokens, text) in enumerate(answers):
            assert tokens == right(request(f"r{number}", number))
            assert text == tokenizer.decode(tokens)

    with LMDeployBackend(engine, stop_at_eos=False, tokenizer=tokenizer) as backend:
        loaded = LoadedBackend(backend, backend.target, tokenizer, "fake")
        served = SageLLMEngine(loaded, engine_id="e", pipeline="O2", max_waiting=8)
        served.start()
        try:
            asyncio.run(work(served))
        finally:
            served.stop()
