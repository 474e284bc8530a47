"""Real vLLM under plans answers what default vLLM answers: SmolLM2, fp32, greedy."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from vllm import LLM, SamplingParams

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.plan import KVMove, PlanRequest, PlanStep
from sagellm_ir.lowering.serial import load_plan, save_plan
from sagellm_ir.passes.pipeline import PRESETS
from sagellm_ir.request import Request, Sampling
from sagellm_ir.runtime.backend import EngineView, InferenceBackend, TokenEvent
from sagellm_ir.runtime.engines import LoadedBackend, load_backend
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, load_model
from sagellm_ir.runtime.engines.embedded.export import export_folder
from sagellm_ir.runtime.engines.simulator import SimulatorEngine
from sagellm_ir.runtime.engines.vllm.load import _environment, engine_settings
from sagellm_ir.runtime.engines.vllm.versions import TESTED_VERSIONS, check_version
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.runtime.running import Answer, RunReport, run_plan
from sagellm_ir.runtime.trace import Trace, Traced, differences
from tests.vllm.real import (
    OVERRIDES,
    default_answers,
    pad_heads,
    settings,
    tokens_of,
    workload,
)

FRONT = "canonicalize,prefix-dedup,kv-reuse,chunk-prefill,disaggregate,schedule"
POLICIES = ("belady", "lru", "lfu", "fifo", "cost")
Answers = dict[str, list[int]]
SAMPLED = {
    "seeded": Sampling(temperature=2.0, top_p=0.99, top_k=200, seed=11),
    "stopped": Sampling(stop=(" the", "France")),
    "greedy": Sampling(),
}
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_folder("smollm2-135m", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def asked(folder: Path) -> list[tuple[Request, SamplingParams]]:
    """The workload, and a question under other sampling parameters and stop conditions."""
    from sagellm_ir.request import TokenPrompt
    from sagellm_ir.runtime.engines.embedded import load_tokenizer

    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    prompt = TokenPrompt(tuple(tokenizer.encode(QUESTION)))
    pairs = [
        (r, SamplingParams(temperature=0, max_tokens=r.max_new_tokens, ignore_eos=True))
        for r in workload()
    ]
    for name, sampling in SAMPLED.items():
        request = Request(name, prompt=prompt, max_new_tokens=24, sampling=sampling)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=list(sampling.stop),
            max_tokens=24,
        )
        pairs.append((request, params))
    return pairs


@pytest.fixture(scope="module")
def expected(folder: Path, asked: list[tuple[Request, SamplingParams]]) -> dict[str, Any]:
    """What default vLLM answers."""
    return default_answers(folder, asked)


@pytest.fixture(scope="module")
def loaded(folder: Path, expected: object) -> Iterator[LoadedBackend]:
    """Made after the default engine has ended: vLLM's workers are one a process."""
    made = load_backend("vllm", str(folder), overrides=OVERRIDES, stop_at_eos=False)
    yield made
    made.backend.close()  # type: ignore[attr-defined]


def run(loaded: LoadedBackend, pipeline: str) -> RunReport:
    plan = compile_requests(workload(), loaded.target, pipeline).plan
    return run_plan(loaded.backend, plan)


def tokens(report: RunReport) -> Answers:
    return {name: answer.tokens for name, answer in report.answers.items()}


def theirs(expected: dict[str, Any], names: Iterable[str]) -> Answers:
    return {name: list(expected[name].token_ids) for name in names}


def collect(events: Iterable[TokenEvent]) -> Answers:
    found: Answers = {}
    for event in events:
        if event.token is not None:
            found.setdefault(event.request, []).append(event.token)
            assert event.index == len(found[event.request]) - 1
    return found


def test_it_is_a_backend(loaded: LoadedBackend) -> None:
    assert isinstance(loaded.backend, InferenceBackend)
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


def test_targets_that_vllm_cannot_run(folder: Path) -> None:
    for overrides, message in (
        ({"block_size": 16}, "no multiple of 32"),
        ({"workers": 2}, "2 workers"),
    ):
        with pytest.raises(SageIRError, match=message):
            load_backend("vllm", str(folder), overrides=overrides)


def test_vllms_own_entry_point(
    loaded: LoadedBackend, folder: Path, expected: dict[str, Any]
) -> None:
    """`LLM(scheduler_cls=...)`, planned online: nothing of ours but the scheduler and connector."""
    loaded.backend.close()  # type: ignore[attr-defined]
    ours = engine_settings(folder, loaded.target, "float32")
    keys = ("scheduler_cls", "kv_transfer_config", "async_scheduling")
    more = {key: ours[key] for key in keys} | {"max_num_seqs": 3, "max_num_batched_tokens": 96}
    requests = workload()
    prompts = [{"prompt_token_ids": list(tokens_of(request))} for request in requests]
    params = [
        SamplingParams(temperature=0, max_tokens=r.max_new_tokens, ignore_eos=True)
        for r in requests
    ]
    with _environment():
        engine = LLM(**settings(folder, **more))
        outputs = engine.generate(prompts, params, use_tqdm=False)
        core = engine.llm_engine.engine_core
        prefilled = core.engine_core.scheduler.stats.prefill_tokens
        core.shutdown()
    answers = {r.id: list(o.outputs[0].token_ids) for r, o in zip(requests, outputs, strict=True)}
    assert answers == theirs(expected, answers)
    assert prefilled < sum(map(len, (tokens_of(r) for r in requests)))


@pytest.mark.skipif(
    check_version() != TESTED_VERSIONS[-1], reason="40 s: with the newest release only"
)
def test_two_ranks(folder: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    """Tensor parallelism: each rank moves its own heads. A padded model, as 9 heads do not halve."""
    padded = pad_heads(folder, tmp_path / "padded", kv_heads=4)
    more = {"tp": 2, "device": {"step_overhead": 1e-9}}
    loaded = load_backend("vllm", str(padded), overrides={**OVERRIDES, **more}, stop_at_eos=False)
    try:
        report = run(loaded, f"{FRONT},evict{{policy=lru, spill=always}}")
    finally:
        loaded.backend.close()  # type: ignore[attr-defined]
    assert report.moved_blocks > 0
    assert tokens(report) == theirs(expected, report.answers)
