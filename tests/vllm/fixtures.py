"""What the tests with a real vLLM share: the model, default vLLM's answers, one engine under plans."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.request import Request, Sampling, TokenPrompt
from sagellm_ir.runtime.engines import LoadedBackend, load_backend
from sagellm_ir.runtime.engines.embedded.export import export_folder
from sagellm_ir.runtime.running import RunReport, run_plan
from tests.vllm.real import (
    OVERRIDES,
    default_answers,
    workload,
)

__all__ = [
    "FRONT",
    "SAMPLED",
    "Answers",
    "asked",
    "expected",
    "folder",
    "loaded",
    "run",
    "theirs",
    "tokens",
]

FRONT = "canonicalize,prefix-dedup,kv-reuse,chunk-prefill,disaggregate,schedule"
Answers = dict[str, list[int]]
SAMPLED = {
    "seeded": Sampling(temperature=2.0, top_p=0.99, top_k=200, seed=11),
    "stopped": Sampling(stop=(" the", "France")),
    "greedy": Sampling(),
}
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_folder("smollm2-135m", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def asked(folder: Path) -> list[tuple[Request, SamplingParams]]:
    """The workload, and a question under other sampling parameters and stop conditions."""
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


@pytest.fixture(scope="session")
def expected(folder: Path, asked: list[tuple[Request, SamplingParams]]) -> dict[str, Any]:
    """What default vLLM answers."""
    return default_answers(folder, asked)


@pytest.fixture(scope="session")
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
