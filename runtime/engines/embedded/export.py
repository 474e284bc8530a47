"""Write a model as a Hugging Face folder: what vLLM, LMDeploy and transformers load."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sagellm_ir.runtime.engines.embedded.load import DTYPES, open_model
from sagellm_ir.runtime.engines.embedded.model_config import ModelConfig
from sagellm_ir.runtime.engines.embedded.weights import is_rotated, tensor_shapes

__all__ = ["export_folder", "half_split_order", "model_folder"]

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def export_folder(name: str | Path, out: Path, dtype: str = "float32") -> Path:
    """Write `config.json`, `model.safetensors` and the tokenizer's files of a model into `out`.

    Args:
        name: as for `load_model`.
        out: made if it is missing; files of these names are replaced.
        dtype: of the written weights; one of `DTYPES`.

    Raises:
        SageIRError: there is no such model, or it is broken.
    """
    config, weights, tokenizer = open_model(name)
    tensors: dict[str, Tensor] = {}
    for key, shape in tensor_shapes(config).items():
        tensor = weights.get(key, shape).to(DTYPES[dtype])
        tensors[key] = half_split_order(tensor, config.head_dim) if is_rotated(key) else tensor
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        str(out / "model.safetensors"),
        {"format": "pt"},
    )
    _write(out / "config.json", _hf_config(config, dtype))
    _write(out / "generation_config.json", {"eos_token_id": list(config.eos)})
    if tokenizer is not None:
        tokenizer.inner.save(str(out / "tokenizer.json"))
        extra = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.tokens}
        _write(out / "tokenizer_config.json", extra | {"chat_template": tokenizer.template})
    return out


@contextmanager
def model_folder(model: str | Path, dtype: str) -> Iterator[Path]:
    """A model as a Hugging Face folder; one made from a GGUF file is removed at the end."""
    if Path(model).is_dir():
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield export_folder(model, Path(folder), dtype)


def half_split_order(weight: Tensor, head_dim: int) -> Tensor:
    """Undo `pair_order`."""
    pairs = weight.view(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    scaling = config.rope_scaling
    return {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
        if scaling
        else None,
        "tie_word_embeddings": config.tied,
        "eos_token_id": list(config.eos) or None,
        "torch_dtype": dtype,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
