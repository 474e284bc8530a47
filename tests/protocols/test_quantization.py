"""Quantisation profiles: both file forms, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.presets import load_model
from sagellm_ir.runtime.protocols import QuantizationProfile

MEASURED = QuantizationProfile(
    "fp8_e4m3", "head", ((0.5, 1.25), (2.0, 1e-5)), ((1.0, 3.0), (0.125, 7e4)), "some/model"
)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize(
    "profile", [MEASURED, QuantizationProfile("int8"), QuantizationProfile("fp8_e5m2", "block")]
)
def test_round_trip(tmp_path: Path, suffix: str, profile: QuantizationProfile) -> None:
    path = tmp_path / f"p.{suffix}"
    profile.save(path)
    found = QuantizationProfile.load(path)
    assert evolve(found, key_scales=(), value_scales=(), scales="block") == evolve(
        profile, key_scales=(), value_scales=(), scales="block"
    )
    assert found.scales == profile.scales
    for mine, theirs in ((found.key_scales, profile.key_scales), (found.value_scales, profile.value_scales)):  # fmt: skip
        assert [pytest.approx(row, rel=1e-7) for row in mine] == [list(row) for row in theirs]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scales": "token_head"}, "computed, not given"),
        ({"key_scales": ()}, "one row for each layer"),
        ({"key_scales": ((1.0,), (1.0, 2.0))}, "one scale for each KV head"),
        ({"value_scales": ((1.0, 1.0), (1.0, 0.0))}, "above 0"),
        ({"value_scales": ((1.0, 1.0), (1.0, float("nan")))}, "above 0"),
        ({"dtype": "int4"}, "did you mean"),
        ({"scales": "hed"}, "'head'"),
    ],
)
def test_impossible_profiles(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        evolve(MEASURED, **change)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"dtype": "int8",\n "scale": 1}', (":2:", "scale: unknown field", "'scales'")),
        ('{"scales": "block"}', ("dtype: this field is missing",)),
        ('{"dtype": "int8", "scales": "head", "key_scales": [[1]], "value_scales": "x"}', (":1:", "value_scales: expected a list")),
        ("[1]", ("expected a mapping",)),
        ("{", ("is not YAML",)),
    ],
)  # fmt: skip
def test_broken_json(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(SageIRError) as caught:
        QuantizationProfile.load(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_broken_tensors(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(SageIRError, match="cannot read"):
        QuantizationProfile.load(path)
    MEASURED.save(path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    del header["__metadata__"]["dtype"]
    text = json.dumps(header).encode().ljust(length)
    for broken in (whole[:-3], b"\x80\x04N.", whole[:8] + text + whole[8 + length :], b""):
        path.write_bytes(broken)
        with pytest.raises(SageIRError, match="is no quantisation profile"):
            QuantizationProfile.load(path)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    for call in (MEASURED.save, QuantizationProfile.load):
        with pytest.raises(SageIRError, match=r"a \.json or \.safetensors file"):
            call(tmp_path / "p.pt")


def test_another_model_is_refused() -> None:
    with pytest.raises(SageIRError, match="2 layers of 2 KV heads"):
        MEASURED.check(load_model("smollm2-135m"))
    QuantizationProfile("int8").check(load_model("smollm2-135m"))
