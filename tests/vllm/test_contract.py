"""Real vLLM under plans answers what default vLLM answers: SmolLM2, fp32, greedy."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from vllm import SamplingParams

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.plan import KVMove, PlanRequest, PlanStep
from sagellm_ir.lowering.serial import load_plan, save_plan
from sagellm_ir.passes.pipeline import PRESETS
from sagellm_ir.request import Request, Sampling, TokenPrompt
from sagellm_ir.runtime.backend import EngineView, InferenceBackend, TokenEvent
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, load_model
from sagellm_ir.runtime.engines.simulator import SimulatorEngine
from sagellm_ir.runtime.engines.vllm.versions import CASCADE, check_version
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.runtime.running import Answer, run_plan
from sagellm_ir.runtime.trace import Trace, Traced, differences
from tests.vllm.fixtures import FRONT, SAMPLED, Answers, run, theirs, tokens
from tests.vllm.real import (
    tokens_of,
    workload,
)

POLICIES = ("belady", "lru", "lfu", "fifo", "cost")


def collect(events: Iterable[TokenEvent]) -> Answers:
    found: Answers = {}
    for event in events:
        if event.token is not None:
            found.setdefault(event.request, []).append(event.token)
            assert event.index == len(found[event.request]) - 1
    return found


def test_it_is_a_backend(loaded: LoadedBackend) -> None:
    assert isinstance(loaded.backend, InferenceBackend)
    assert loaded.backend.depth == 1  # vLLM does not schedule asynchronously on a CPU
    capability = loaded.backend.capability
    assert capability.block_size_multiple == 32
    assert capability.kv_dtypes == ("fp32",)
    assert loaded.target.model.kv_heads == 3
    assert loaded.tokenizer is not None


@pytest.mark.parametrize("pipeline", PRESETS)
def test_presets(loaded: LoadedBackend, expected: dict[str, Any], pipeline: str) -> None:
    report = run(loaded, pipeline)
    assert tokens(report) == theirs(expected, report.answers)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_on_a_short_pool(
    loaded: LoadedBackend, expected: dict[str, Any], policy: str
) -> None:
    """Spilled to the host and fetched into other blocks, or dropped and computed again."""
    spilled = run(loaded, f"{FRONT},evict{{policy={policy}, spill=always}}")
    dropped = run(loaded, f"{FRONT},evict{{policy={policy}, spill=never}}")
    for report in (spilled, dropped):
        assert tokens(report) == theirs(expected, report.answers)
    assert spilled.moved_blocks > 0 == dropped.moved_blocks
    assert dropped.computed_tokens > spilled.computed_tokens
    assert spilled.saved_tokens > 0


@pytest.mark.parametrize("pipeline", ["O2", f"{FRONT},evict{{policy=lru, spill=always}}"])
def test_one_plan_on_three_engines(
    loaded: LoadedBackend, folder: Path, expected: dict[str, Any], tmp_path: Path, pipeline: str
) -> None:
    """One plan file: the same tokens, and each engine's own report of chunks and sharing agrees."""
    save_plan(compile_requests(workload(), loaded.target, pipeline).plan, tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    model = load_model(folder)
    embedded = EmbeddedEngine(model, evolve(plan.target, model=model.spec), stop_at_eos=False)
    traces, answers = [], []
    for engine in (loaded.backend, embedded, SimulatorEngine(plan.target)):
        assert isinstance(engine, Traced)
        engine.trace = Trace(engine.capability.engine, plan.target.block_size)
        answers.append(tokens(run_plan(engine, plan)))
        traces.append(engine.trace)
        engine.trace = None
    assert answers[0] == answers[1] == theirs(expected, answers[0])
    assert differences(traces[0], traces[1]) == []
    assert differences(traces[0], traces[2]) == []
    # vLLM's blocks were the plan's own, each in its place.
    assert [f.rows for f in traces[0].forwards] == [f.rows for f in traces[2].forwards]


def test_steps_mix_and_chunks_are_cut(loaded: LoadedBackend) -> None:
    """What the tests above ran did what they are for."""
    plan = compile_requests(workload(), loaded.target, "O2").plan
    assert any(step.prefill and step.decode for step in plan.steps)
    assert any(len(step.prefill) > 1 for step in plan.steps)
    ends = {request.id: request.prompt_len for request in plan.requests}
    assert any(chunk.stop < ends[chunk.request] for step in plan.steps for chunk in step.prefill)


def test_a_spoiled_plan_answers_otherwise(loaded: LoadedBackend, expected: dict[str, Any]) -> None:
    """The comparison above would see KV that was not brought back."""
    plan = compile_requests(
        workload(), loaded.target, f"{FRONT},evict{{policy=lru, spill=always}}"
    ).plan
    steps = tuple(
        evolve(
            s, kv=tuple(k for k in s.kv if not (isinstance(k, KVMove) and k.from_tier == "host"))
        )
        for s in plan.steps
    )
    assert steps != plan.steps
    report = run_plan(loaded.backend, evolve(plan, steps=steps))
    assert tokens(report) != theirs(expected, report.answers)


def test_online_with_aborts(loaded: LoadedBackend, expected: dict[str, Any]) -> None:
    """Requests come while others run, one goes; the planner compiles tick by tick."""
    backend, planner = loaded.backend, OnlinePlanner(loaded.target, reserve=4)
    waiting = workload()
    gone = waiting[1].id
    events: list[TokenEvent] = []

    class Arriving:
        """Submits two requests at a time between steps."""

        ticks = 0

        def next_step(self, view: EngineView) -> PlanStep | None:
            self.ticks += 1
            for request in waiting[:2] if self.ticks % 2 else ():
                made = PlanRequest(
                    request.id,
                    max_new_tokens=request.max_new_tokens,
                    priority=request.priority,
                    prompt_len=len(tokens_of(request)),
                    tokens=tokens_of(request),
                )
                backend.submit(made)
                planner.submit(made)
                waiting.remove(request)
            if self.ticks == 4:
                backend.abort(gone)
            step = planner.next_step(backend.view())
            return PlanStep(0) if step is None and waiting else step

    events = list(backend.stream(Arriving()))
    answers = collect(events)
    want = theirs(expected, [request.id for request in workload()])
    cut = answers.pop(gone, [])
    assert cut == want.pop(gone)[: len(cut)]
    assert [e.finish for e in events if e.request == gone][-1] == "abort"
    assert answers == want
    for request in workload():
        backend.release(request.id)
    assert backend.view().waiting == backend.view().running == backend.view().finished == ()


def test_sampling_and_stops_reach_vllm(
    loaded: LoadedBackend, asked: list[tuple[Request, SamplingParams]], expected: dict[str, Any]
) -> None:
    """Seeded draws, stop strings and the text of the stream are default vLLM's."""
    requests = [request for request, _ in asked if request.id in SAMPLED]
    backend: Any = loaded.backend
    backend._stop_at_eos = True
    answers: dict[str, Answer] = {}
    for request in requests:
        report = run_plan(backend, compile_requests([request], loaded.target, "O2").plan)
        answers |= report.answers
    backend._stop_at_eos = False
    for name in SAMPLED:
        got, want = answers[name], expected[name]
        assert got.tokens == list(want.token_ids)
        assert (got.text, got.finish) == (want.text, want.finish_reason)
    assert answers["seeded"].tokens != answers["greedy"].tokens
    assert answers["stopped"].finish == "stop"


def test_likelihoods(loaded: LoadedBackend, expected: dict[str, Any]) -> None:
    request = evolve(workload()[0], sampling=Sampling(logprobs=3))
    plan = compile_requests([request], loaded.target, "O2").plan
    events: list[TokenEvent] = []
    run_plan(loaded.backend, plan, events.append)
    assert collect(events) == theirs(expected, [request.id])
    for event in events:
        assert event.likelihood is not None
        assert event.likelihood.top[0] == (event.token, event.likelihood.logprob)  # greedy
        assert len(event.likelihood.top) == 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PlanRequest("x", prompt_len=3), "have no tokens"),
        (
            PlanRequest("x", prompt_len=3, tokens=(1, 2, 3), max_new_tokens=9999),
            "may grow to 10002",
        ),
        (PlanRequest("x", prompt_len=1, tokens=(1,), adapter="lora"), "adapter 'lora'"),
    ],
)
def test_requests_that_cannot_run(
    loaded: LoadedBackend, request_: PlanRequest, message: str
) -> None:
    with pytest.raises(SageIRError, match=message):
        loaded.backend.submit(request_)


def test_sampling_that_vllm_refuses(loaded: LoadedBackend) -> None:
    request = PlanRequest("x", prompt_len=1, tokens=(1,))
    with pytest.raises(SageIRError, match="top_p"):
        loaded.backend.submit(request, Sampling(temperature=1.0, top_p=2.0))
    loaded.backend.submit(request)
    with pytest.raises(SageIRError, match="running already"):
        loaded.backend.submit(request)
    loaded.backend.release("x")


@pytest.mark.skipif(
    check_version() not in CASCADE, reason="this release's attention has no use for prefix groups"
)
def test_groups_reach_the_attention(loaded: LoadedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks its attention about the prefix of the plan's group. On a CPU that declines, always."""
    backend: Any = loaded.backend
    assert not backend.capability.prefix_groups
    runner = backend.engine.collective_rpc(lambda worker: worker.model_runner)[0]
    builder = runner.attn_groups[0][0].get_metadata_builder()
    lengths: list[int] = []

    def use_cascade_attention(common_prefix_len: int, **_: Any) -> bool:
        lengths.append(common_prefix_len)
        return False

    monkeypatch.setattr(builder, "use_cascade_attention", use_cascade_attention)
    monkeypatch.setattr(runner, "cascade_attn_enabled", True)
    monkeypatch.setattr(runner, "num_sms", 1, raising=False)  # what it tells the attention of a GPU
    monkeypatch.setattr(backend.scheduler, "takes_groups", True)
    document = tokens_of(workload()[0])[:64]
    requests = [
        Request(f"g{at}", prompt=TokenPrompt((*document, 2000 + at)), max_new_tokens=4)
        for at in range(3)
    ]
    plan = compile_requests(requests, loaded.target, "O2").plan
    run_plan(backend, plan)
    assert max(lengths) == len(document)
