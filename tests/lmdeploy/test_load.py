"""`load_backend("lmdeploy", ...)`: what LMDeploy is told of a target, and what is refused."""

from pathlib import Path

import pytest
from attrs import evolve
from lmdeploy.messages import PytorchEngineConfig

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.engines import load_backend
from sagellm_ir.runtime.engines.lmdeploy import load as loading
from sagellm_ir.runtime.engines.lmdeploy.load import engine_settings
from sagellm_ir.runtime.engines.lmdeploy.patching import PatchStatus
from sagellm_ir.runtime.protocols import KVSchemaConfig
from sagellm_ir.target import Worker

TARGET = load_target("h100", max_batch=17, max_tokens=4096, max_loops=4)


def test_lmdeploy_takes_the_settings() -> None:
    config = PytorchEngineConfig(**engine_settings(TARGET, "bfloat16"))
    assert config.max_batch_size == 17
    assert config.max_prefill_token_num == 4096
    assert config.prefill_interval == 4
    assert config.block_size == TARGET.block_size
    assert config.enable_prefix_caching
    assert config.quant_policy == 0
    int8 = KVSchemaConfig.parse("preset=int8")
    assert engine_settings(TARGET, "bfloat16", int8)["quant_policy"] == 8


def test_what_it_cannot_run() -> None:
    two = evolve(TARGET, workers=(Worker("a"), Worker("b")))
    with pytest.raises(SageIRError, match="2 workers"):
        engine_settings(two, "bfloat16")
    with pytest.raises(SageIRError, match="cannot store KV as fp8_e4m3"):
        engine_settings(TARGET, "bfloat16", KVSchemaConfig.parse("preset=fp8"))


@pytest.mark.parametrize(("state", "why"), [("stock", "not patched"), ("patched", "CUDA device")])
def test_an_lmdeploy_that_cannot_be_driven_is_refused(
    state: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = PatchStatus(tmp_path, "0.11.0", state, (), ())  # type: ignore[arg-type]
    monkeypatch.setattr(loading, "status", lambda target: found)
    with pytest.raises(SageIRError, match=why):
        load_backend("lmdeploy", str(tmp_path))
