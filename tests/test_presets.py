"""Target and model presets: the figures they give, and what a wrong file says."""

from pathlib import Path
from typing import Any

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.presets import load_model, load_target, model_names, target_names
from sagellm_ir.runtime.engines import BACKENDS, BackendKind
from sagellm_ir.target import ModelSpec, Target, Tier, Worker

CONFIG = Path(__file__).parents[1] / "config"


def tier(target: Target, name: str) -> Tier:
    found = target.tier(name)
    assert found is not None
    return found


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def refusal(name: Any, **overrides: Any) -> str:
    with pytest.raises(SageIRError) as caught:
        load_target(name, **overrides)
    return str(caught.value)


def test_presets_are_the_files() -> None:
    assert target_names() == ["cpu", "h100", "h200", "vllm-cpu"]
    assert model_names() == ["llama-3-8b", "qwen2.5-7b", "smollm2-135m"]


@pytest.mark.parametrize("name", ["cpu", "h100", "h200", "vllm-cpu"])
def test_every_preset_loads_under_its_name(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert load_target(CONFIG / "targets" / f"{name}.yaml") == target


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-7b", "smollm2-135m"])
def test_every_model_loads_under_its_name(name: str) -> None:
    assert load_model(name).name == name


@pytest.mark.parametrize(("name", "billions"), [("llama-3-8b", 8.03), ("qwen2.5-7b", 7.61)])
def test_shapes_give_the_published_number_of_weights(name: str, billions: float) -> None:
    # Published: 8.03 and 7.61 billion, with an embedding and a head.
    model = load_model(name)
    assert (model.layer_params + 2 * model.head_params) / 1e9 == pytest.approx(billions, abs=0.01)


def test_smollm2_ties_its_embedding() -> None:
    model = load_model("smollm2-135m")
    assert (model.layer_params + model.head_params) / 1e6 == pytest.approx(134.5, abs=0.1)


def test_cpu_is_the_default_target() -> None:
    assert load_target("cpu") == Target()


def test_every_figure_of_a_target_names_its_source() -> None:
    for path in (CONFIG / "targets").glob("*.yaml"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            name = line.strip().split(":")[0]
            if name in {"flops", "bandwidth", "step_overhead", "bytes", "memory", "latency"}:
                # The comment stands behind the figure or above it.
                assert "#" in line or lines[number - 1].strip().startswith("#"), f"{path}: {line}"


def test_the_arithmetic_in_the_comments_holds() -> None:
    h200, h100 = load_target("h200"), load_target("h100")
    assert h200.block_bytes == 3_670_016
    assert (tier(h200, "device").blocks, tier(h200, "host").blocks) == (30_427, 17_438)
    assert tier(h100, "device").blocks == 15_468
    assert load_target("cpu").block_bytes == 737_280


def test_overrides_derive_the_sizes_again() -> None:
    target = load_target("h200", block_size=512, tp=2)
    assert target.tp == 2
    # (2 * 126.9e9 - 15.23e9) bytes in blocks of 8 * 3,670,016
    assert tier(target, "device").blocks == 8125
    assert tier(target, "host").blocks == 64_000_000_000 // (8 * 3_670_016)
    larger = load_target("h200", model="llama-3-8b")
    assert larger.model == load_model("llama-3-8b")
    assert tier(larger, "device").blocks < tier(load_target("h200"), "device").blocks


def test_overrides_merge_into_the_file() -> None:
    target = load_target(
        "h200", workers=2, tiers={"host": {"blocks": 7}}, device={"flops": 1}, model={"layers": 2}
    )
    assert target.workers == (Worker("w0"), Worker("w1"))
    assert tier(target, "host") == Tier("host", 7, 5.0e10, 2.0e-5)
    assert (target.device.flops, target.device.bandwidth) == (1.0, 4.3e12)
    assert (target.model.layers, target.model.hidden) == (2, 3584)


def test_a_file_says_only_what_differs(tmp_path: Path) -> None:
    path = write(tmp_path, "name: mine\nworkers:\n  - {name: p, role: prefill}\n  - {name: d}\n")
    target = load_target(path)
    assert target == Target(name="mine", workers=(Worker("p", "prefill"), Worker("d")))
    assert load_target(str(path)) == target


def test_an_inline_model(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, "model: {name: tiny, layers: 2}"))
    assert target.model == ModelSpec(name="tiny", layers=2)


def test_numbers_that_yaml_takes_for_text_or_float(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, "max_tokens: 4.0e+3\ndevice: {flops: 1e9, bandwidth: 5}"))
    assert (target.max_tokens, target.device.flops, target.device.bandwidth) == (4000, 1e9, 5.0)
    assert type(target.max_tokens) is int


BAD = [
    ("max_tokens: 0", "1:13: error: max_tokens: must be > 0: 0"),
    ("max_batch: -1", "1:12: error: max_batch: must be > 0: -1"),
    ("block_size: 2.5", "1:13: error: block_size: expected a whole number, got 2.5"),
    ("tp: true", "1:5: error: tp: expected a whole number, got True"),
    ("mixed: 1", "1:8: error: mixed: expected true or false, got 1"),
    ("name: 5", "1:7: error: name: expected a text, got 5"),
    ("max_toknes: 3", "1:13: error: max_toknes: unknown field\nhelp: did you mean 'max_tokens'?"),
    ("device:\n  flops: fast", "2:10: error: device.flops: expected a number, got 'fast'"),
    ("device: {flops: .nan}", "1:17: error: device.flops: expected a number, got nan"),
    ("device: {bandwidth: 0}", "1:21: error: device.bandwidth: must be > 0: 0.0"),
    ("device: 5", "1:9: error: device: expected a mapping"),
    ("device:", "1:8: error: device: expected a mapping"),
    ("model: []", "1:8: error: model: expected a mapping"),
    ("workers: abc", "1:10: error: workers: expected a list, or a number up to 1024, got 'abc'"),
    ("workers: 100000000", "1:10: error: workers: expected a list, or a number up to 1024"),
    ("workers: [a]", "1:11: error: workers[0]: expected a mapping"),
    ("model: gpt", "1:8: error: model: there is no model preset 'gpt'\nhelp: known: llama-3-8b"),
    ("model: ../../secret", "1:8: error: model: there is no model preset '../../secret'"),
    ("model: {layers: 0}", "1:17: error: model.layers: must be > 0: 0"),
    ("workers: 0", "1:10: error: workers: expected at least one worker"),
    ("workers:\n- {name: a}\n- {name: a}", "2:1: error: workers: two workers have the same name"),
    ("workers:\n- {role: decode}", "2:3: error: workers[0].name: this field is missing"),
    ("workers:\n- {name: a, role: x}", "2:19: error: workers[0].role: must be in"),
    ("tiers: 5", "1:8: error: tiers: expected a mapping from names to tiers, got 5"),
    ("tiers: {host: {blocks: 5}}", "1:8: error: tiers: there is no tier 'device'"),
    ("tiers: {device: 5}", "1:17: error: tiers.device: expected a mapping, got 5"),
    ("tiers: {device: {}}", "1:17: error: tiers.device: expected one of blocks, bytes, memory"),
    ("tiers: {device: {blocks: 1, bytes: 1}}", "tiers.device: expected one of blocks, bytes"),
    ("tiers: {device: {blocks: -1}}", "1:26: error: tiers.device.blocks: must be >= 0: -1"),
    ("tiers: {device: {blocks: 1, latency: -1}}", "tiers.device.latency: must be >= 0"),
    ("tiers: {device: {block: 1}}", "tiers.device.block: unknown field\nhelp: did you mean"),
    (
        "model: qwen2.5-7b\ntiers: {device: {memory: 1.0e+9}}",
        "2:26: error: tiers.device.memory: 15.2 GB of weights leave no room for a KV block",
    ),
    ("tp: 1\ntp: 2", "2:1: error: tp: this field is given twice"),
    ("tp: &a [1]\ntiers: *a", "2:8: error: aliases (*name) are not supported"),
    ("tp: [1", "is not YAML"),
    ("[]", "mine.yaml: expected a mapping from fields to values"),
    ("5: 6", "mine.yaml: expected a mapping from fields to values"),
    ("!!python/object:os.system {}", "is not YAML: could not determine a constructor"),
    ("? [a]\n: b", "is not YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_a_wrong_file_says_what_and_where(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    shown = refusal(path)
    assert message in shown
    if message[0].isdigit():
        assert shown.startswith(f"{path}:{message}")


def test_all_wrong_fields_are_told_at_once(tmp_path: Path) -> None:
    shown = refusal(write(tmp_path, "tp: x\nmodel: {layers: y}\nengin: z"))
    assert shown.count("error:") == 3


def test_a_wrong_override_is_not_blamed_on_a_line_of_the_file() -> None:
    assert refusal("h200", tp=-2) == "error: h200: tp: must be > 0: -2"
    assert refusal("h200", tiers={"host": {"blocks": "x"}}).startswith("error: h200: tiers.host")
    assert "did you mean 'block_size'?" in refusal("cpu", blocksize=4)


def test_unknown_names() -> None:
    assert refusal("h20") == "error: there is no target preset 'h20'\nhelp: did you mean 'h200'?"
    assert "cannot read ../targets/h200: No such file" in refusal("../targets/h200")
    assert "cannot read none.yaml: No such file" in refusal("none.yaml")
    with pytest.raises(SageIRError, match="there is no model preset 'qwen'"):
        load_model("qwen")


def test_a_file_too_large(tmp_path: Path) -> None:
    assert "is larger than" in refusal(write(tmp_path, "# " + "x" * (1 << 20)))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\xff")
    assert "is not YAML" in refusal(path)


@pytest.mark.parametrize("kind", [kind for kind in BACKENDS if kind.name != "simulator"])
def test_an_engine_s_own_target_is_for_it(kind: BackendKind) -> None:
    assert load_target(kind.target).engine == kind.name
