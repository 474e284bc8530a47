"""Engines of other kinds than the contract's: refused, in eight bits, of two ranks, vLLM's own entry point."""

from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.engines import LoadedBackend, load_backend
from sagellm_ir.runtime.engines.vllm.load import _environment, engine_settings
from sagellm_ir.runtime.engines.vllm.versions import TESTED_VERSIONS, check_version
from sagellm_ir.runtime.protocols import KVSchemaConfig
from tests.vllm.fixtures import FRONT, run, theirs, tokens
from tests.vllm.real import (
    OVERRIDES,
    default_answers,
    pad_heads,
    settings,
    tokens_of,
    workload,
)


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
    keys = ("scheduler_cls", "kv_transfer_config")
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
    check_version() != TESTED_VERSIONS[-1], reason="20 s: with the newest release only"
)
def test_kv_in_eight_bits(loaded: LoadedBackend, folder: Path, expected: dict[str, Any]) -> None:
    """`--kv-schema preset=fp8`: default vLLM's answers with its `kv_cache_dtype`, which are others'."""
    loaded.backend.close()  # type: ignore[attr-defined]
    schema = KVSchemaConfig.parse("preset=fp8")
    plain = [
        (r, SamplingParams(temperature=0, max_tokens=r.max_new_tokens, ignore_eos=True))
        for r in workload()
    ]
    found = default_answers(folder, plain, kv_cache_dtype="fp8_e4m3")
    small = load_backend(
        "vllm", str(folder), overrides=OVERRIDES, stop_at_eos=False, kv_schema=schema
    )
    try:
        assert small.backend.capability.kv_dtypes == ("fp8_e4m3",)
        assert small.target.model.kv_head_bytes == 64
        report = run(small, f"{FRONT},evict{{policy=lru, spill=always}}")
    finally:
        small.backend.close()  # type: ignore[attr-defined]
    assert report.moved_blocks > 0
    assert tokens(report) == theirs(found, report.answers)
    assert tokens(report) != theirs(expected, report.answers)


def test_kv_that_this_vllm_cannot_store(folder: Path) -> None:
    schema = KVSchemaConfig.parse("preset=int8")
    with pytest.raises(SageIRError, match="vLLM on cpu cannot store KV as int8"):
        load_backend("vllm", str(folder), overrides=OVERRIDES, kv_schema=schema)


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
