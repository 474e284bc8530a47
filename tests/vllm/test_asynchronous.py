"""vLLM's asynchronous worker under plans, on a CPU: its GPU streams are stand-ins that have always caught up.

So a forward is over before the next one is asked for, but vLLM's core and worker do what they do on a
GPU: the core asks for it before it has seen the tokens, and the worker keeps them to itself.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.platforms.cpu import CpuPlatform

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.engines.vllm.engine import VLLMBackendAdapter
from sagellm_ir.runtime.engines.vllm.load import _environment, engine_settings
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
    with pytest.raises(SageIRError, match="async_scheduling=False"):
        VLLMBackendAdapter(engine.llm_engine)
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
