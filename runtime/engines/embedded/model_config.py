"""The shape of a Llama or Qwen2 model, from a Hugging Face `config.json` or GGUF metadata."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.files import read_text
from sagellm_ir.nodes.base import Location
from sagellm_ir.target import ModelSpec

__all__ = ["Llama3Rope", "ModelConfig"]

ARCHITECTURES = ("llama", "qwen2")


@frozen
class Llama3Rope:
    """Llama 3.1's stretched rotary frequencies: low ones are divided by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def scale(self, frequency: float) -> float:
        """One rotary frequency (radians a token), stretched; linear in between the two bounds."""
        turns = self.original_max_position * frequency / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = min(max(keep, 0.0), 1.0)
        return frequency * (keep + (1 - keep) / self.factor)


@frozen
class ModelConfig:
    """What the forward needs to know of a model."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = False
    """Whether the output projection is the embedding."""
    qkv_bias: bool = False
    rope_scaling: Llama3Rope | None = None
    eos: tuple[int, ...] = ()
    """Tokens that end an answer."""
    name: str = ""

    def __attrs_post_init__(self) -> None:
        sizes = [self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim]
        sizes += [self.intermediate, self.vocab, self.max_position]
        if min(sizes) <= 0 or self.heads % self.kv_heads or self.head_dim % 2:
            raise _error(
                f"the model's sizes do not fit together: {self.heads} heads, {self.kv_heads} KV "
                f"heads, head_dim {self.head_dim}, {self.layers} layers, hidden {self.hidden}"
            )

    def spec(self, dtype_bytes: int) -> ModelSpec:
        """The shape as targets describe it."""
        return ModelSpec(
            name=self.name or self.architecture,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            vocab=self.vocab,
            dtype_bytes=dtype_bytes,
        )

    def rope_frequencies(self) -> list[float]:
        """Radians a token, of each of the `head_dim / 2` rotated pairs."""
        plain = [self.rope_theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)]
        return [self.rope_scaling.scale(f) for f in plain] if self.rope_scaling else plain

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `config.json`, and the end tokens of `generation_config.json` if it is there.

        Raises:
            SageIRError: the file is missing or broken, or describes another kind of model.
        """
        path = folder / "config.json"
        raw = read_json(path)
        generation = folder / "generation_config.json"
        extra = read_json(generation) if generation.exists() else {}
        try:
            return cls._from_hf(raw, extra, folder.name)
        except (KeyError, TypeError, ValueError) as error:
            raise _error(f"no usable value for {error}", path) from None

    @classmethod
    def _from_hf(cls, raw: Mapping[str, Any], extra: Mapping[str, Any], name: str) -> "ModelConfig":
        architecture = _architecture(raw.get("model_type", ""))
        _refuse_hf(raw)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        heads = int(raw["num_attention_heads"])
        return cls(
            architecture=architecture,
            layers=int(raw["num_hidden_layers"]),
            hidden=int(raw["hidden_size"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
            intermediate=int(raw["intermediate_size"]),
            vocab=int(raw["vocab_size"]),
            max_position=int(raw.get("max_position_embeddings", 2048)),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta", 10000.0)),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "qwen2",
            rope_scaling=_rope_scaling(rope),
            eos=_token_ids(extra.get("eos_token_id", raw.get("eos_token_id"))),
            name=name,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tied: bool, vocab: int) -> "ModelConfig":
        """From a GGUF file's metadata; `tied` and `vocab` are seen from its tensors.

        Raises:
            SageIRError: a key is missing, or it is another kind of model.
        """
        architecture = _architecture(str(metadata.get("general.architecture", "")))

        def get(key: str) -> Any:
            return metadata[f"{architecture}.{key}"]

        if f"{architecture}.rope.scaling.type" in metadata and get("rope.scaling.type") != "none":
            raise _error(
                f"rope scaling {get('rope.scaling.type')!r} of a GGUF file is not run here"
            )
        try:
            hidden, heads = get("embedding_length"), get("attention.head_count")
            return cls(
                architecture=architecture,
                layers=get("block_count"),
                hidden=hidden,
                heads=heads,
                kv_heads=metadata.get(f"{architecture}.attention.head_count_kv", heads),
                head_dim=metadata.get(f"{architecture}.attention.key_length", hidden // heads),
                intermediate=get("feed_forward_length"),
                vocab=vocab,
                max_position=get("context_length"),
                rope_theta=float(metadata.get(f"{architecture}.rope.freq_base", 10000.0)),
                # Stored as float32: take back the decimal it was written from.
                norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
                tied=tied,
                qkv_bias=architecture == "qwen2",
                eos=_token_ids(metadata.get("tokenizer.ggml.eos_token_id")),
                name=str(metadata.get("general.name", architecture)),
            )
        except (KeyError, TypeError) as error:
            raise _error(f"the GGUF file lacks a usable {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `SageIRError`."""
    try:
        raw = json.loads(read_text(path))
    except ValueError as error:
        raise _error(f"not JSON: {error}", path) from None
    if not isinstance(raw, dict):
        raise _error("expected a JSON object", path)
    return raw


def _architecture(name: str) -> str:
    if name not in ARCHITECTURES:
        raise _error(
            f"the embedded engine runs Llama and Qwen2 models, not {name!r}",
            help=suggest(name, ARCHITECTURES),
        )
    return name


def _refuse_hf(raw: Mapping[str, Any]) -> None:
    """What a config may ask for that this forward does not do."""
    wrong = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "quantization_config": raw.get("quantization_config") is not None,
    }
    for key, refused in wrong.items():
        if refused:
            raise _error(f"{key} = {raw[key]!r} is not run by the embedded engine")


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise _error(f"rope scaling {kind!r} is not run by the embedded engine, only 'llama3'")
    return Llama3Rope(
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )


def _token_ids(value: Any) -> tuple[int, ...]:
    """End tokens are written as nothing, one id, or a list."""
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def _error(message: str, path: Path | None = None, help: str = "") -> SageIRError:
    loc = Location(str(path), 1) if path else None
    return SageIRError(Diagnostic(f"model config: {message}", loc, help=help))
