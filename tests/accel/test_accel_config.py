"""Which attention runs: the preset, the modes, and one log line where the kernels cannot."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.accel import (
    AccelConfig,
    AttentionSpec,
    make_attention,
    unsupported,
    why_not,
)
from sagellm_ir.runtime.accel.attention import PrefixAttention
from sagellm_ir.runtime.config import load_config

SPEC = AttentionSpec(4, 2, 64, 16, torch.float16)


def test_the_preset_is_the_default() -> None:
    assert load_config(env={}).accel == AccelConfig()


@pytest.mark.parametrize(
    ("text", "mode"),
    [("accel: {mode: off}", "off"), ("accel: {mode: prefix_aware}", "prefix_aware"), ("engine: {}", "auto")],
)  # fmt: skip
def test_modes(tmp_path: Path, text: str, mode: str) -> None:
    path = tmp_path / "sage.yaml"
    path.write_text(text)
    assert load_config(path, env={}).accel.mode == mode


def test_measured_constants_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sage.yaml"
    path.write_text("accel: {gate: {launch: 2.5e-6}}")
    assert load_config(path, env={}).accel.gate.launch == 2.5e-6


@pytest.mark.parametrize(
    "text", ["accel: {mode: fast}", "accel: {speed: 1}", "accel: 3", "accel: {gate: {launch: soon}}"]
)  # fmt: skip
def test_a_wrong_file_is_an_error_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sage.yaml"
    path.write_text(text)
    with pytest.raises(SageIRError, match=r"sage\.yaml:1"):
        load_config(path, env={})


def test_fallback_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = make_attention(AccelConfig(), SPEC, max_batch=4, max_rows=4, device="cpu")
    assert made is None
    assert len(caplog.records) == 1
    assert "not a CUDA device" in caplog.text


def test_off_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        off = AccelConfig(mode="off")
        assert make_attention(off, SPEC, max_batch=4, max_rows=4, device="cpu") is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (AttentionSpec(5, 2, 64, 16), "multiple"),
        (AttentionSpec(4, 2, 512, 16), "head_dim"),
        (AttentionSpec(4, 2, 64, 8), "block_size"),
        (AttentionSpec(4, 2, 64, 16, torch.float32), "float32"),
    ],
)
def test_unsupported_shapes_are_named(spec: AttentionSpec, word: str) -> None:
    assert word in str(unsupported(spec))
    with pytest.raises(SageIRError, match=word):
        PrefixAttention(spec, max_batch=1, max_rows=1, device="cpu")


def test_a_device_needs_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        shared_memory_per_block_optin = 99 << 10

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    assert "99 KiB" in str(why_not(SPEC, "cuda"))
    Properties.shared_memory_per_block_optin = 227 << 10
    assert why_not(SPEC, "cuda") is None


@pytest.mark.parametrize(
    ("new", "total", "word"),
    [
        ([1] * 5, [9] * 5, "exceed"),
        ([9], [9], "exceed"),
        ([2], [1], "less than"),
        ([-1], [1], "negative"),
        ([1, 1], [1], "KV lengths"),
    ],
)
def test_bad_batches_are_refused(new: list[int], total: list[int], word: str) -> None:
    kernels = PrefixAttention(SPEC, max_batch=4, max_rows=8, device="cpu", workspace=0)
    with pytest.raises(SageIRError, match=word):
        kernels.update(new, total)


def test_wrong_tensors_are_named() -> None:
    kernels = PrefixAttention(SPEC, max_batch=4, max_rows=8, device="cpu", workspace=0)
    kernels.update([1], [3])
    q = torch.zeros(1, 4, 64, dtype=torch.float16)
    cache = torch.zeros(2, 16, 2, 64, dtype=torch.float16)
    table, lengths = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    good: dict[str, Any] = {
        "q": q,
        "k_cache": cache,
        "v_cache": cache,
        "block_table": table,
        "out": q.clone(),
    }
    for name, bad in [
        ("q", q[:, :2]),
        ("out", q.float()),
        ("k_cache", cache.transpose(2, 3).contiguous().transpose(2, 3)),
        ("v_cache", cache[:, :8]),
        ("block_table", table.long()),
        ("k_scales", cache),
        ("sinks", torch.zeros(4)),
        ("v_scale", 2.0),
    ]:
        with pytest.raises(SageIRError, match=name):
            kernels.run(**good | {name: bad}, kv_lens=lengths)
