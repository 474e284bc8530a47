"""Where a model's weights come from: a safetensors folder, a GGUF file, or a seed.

All sources speak Hugging Face names. Nothing here can run code from a file: pickles are refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.nodes.base import Location
from sagellm_ir.runtime.engines.embedded.gguf import GGUFFile
from sagellm_ir.runtime.engines.embedded.model_config import ModelConfig, read_json

__all__ = [
    "FolderWeights",
    "GGUFWeights",
    "RandomWeights",
    "WeightSource",
    "gguf_in_package",
    "is_rotated",
    "pair_order",
    "tensor_shapes",
]

INDEX = "model.safetensors.index.json"


class WeightSource(Protocol):
    """Tensors by Hugging Face name; the q and k projections' rows in pair order (`pair_order`)."""

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of this name, checked to be of this shape; `SageIRError` if it is not."""
        ...


def pair_order(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder a q or k projection's output rows from half-split to neighbouring rotary pairs.

    Hugging Face rotates element i of a head with element i + head_dim/2; here they stand side by
    side, so that a rotation is one complex product. q and k move alike, so scores are the same.
    """
    halves = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def is_rotated(name: str) -> bool:
    """Whether a tensor is a q or k projection, whose rows `pair_order` moves."""
    return ".q_proj." in name or ".k_proj." in name


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model and its shape, in the order of a forward."""
    hidden, wide = config.hidden, config.intermediate
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab, hidden)}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", query), ("k", kv), ("v", kv)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, query)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (wide, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (wide, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, wide)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, hidden)
    return shapes


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...], where: Path) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise _error(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, the config expects {shape}", where
        )
    return tensor


class FolderWeights:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        SageIRError: there are no weights, a shard is missing or broken, or a name points outside.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._folder = folder
        self._head_dim = config.head_dim
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        for name in self._shards():
            path = folder / name
            try:
                self._files[name] = safe_open(str(path), framework="pt")
            except (OSError, SafetensorError) as error:
                raise _error(f"cannot read the weights: {error}", path) from None
            self._where |= dict.fromkeys(self._files[name].keys(), name)

    def _shards(self) -> list[str]:
        index = self._folder / INDEX
        if index.exists():
            names = set(read_json(index).get("weight_map", {}).values())
            if wrong := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
                raise _error(f"shard {wrong[0]!r} is no plain file name", index)
            return sorted(names)
        if (self._folder / "model.safetensors").exists():
            return ["model.safetensors"]
        found = sorted(p.name for p in self._folder.glob("*.bin"))
        raise _error(
            "the model folder has no weights: expected model.safetensors or its index",
            self._folder,
            help=f"{found[0]} is a pickle: convert it to safetensors"
            if found
            else "copy the model's *.safetensors files into this folder",
        )

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `WeightSource`."""
        if name not in self._where:
            raise _error(f"the weights lack tensor {name!r}", self._folder)
        file = self._where[name]
        tensor: Tensor = self._files[file].get_tensor(name)
        _checked(tensor, name, shape, self._folder / file)
        return pair_order(tensor, self._head_dim) if is_rotated(name) else tensor


_GGUF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


class GGUFWeights:
    """The tensors of a GGUF file, as float32."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        if "rope_freqs.weight" in file.tensors:
            raise _error("rope_freqs (Llama 3.1 scaling in a GGUF file) is not run here", file.path)
        self._file = file
        self._head_dim = config.head_dim
        # Converters to GGUF put Llama's q and k in pair order already, other models' not.
        self._paired = config.architecture == "llama"

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `WeightSource`."""
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            own = f"blk.{layer}.{_GGUF_LAYER[part]}.{kind}"
        else:
            own = f"{_GGUF_TOP[stem]}.{kind}"
        if own not in self._file.tensors:
            raise _error(f"the GGUF file lacks tensor {own!r}", self._file.path)
        tensor = torch.from_numpy(self._file.tensor(own))
        _checked(tensor, own, shape, self._file.path)
        if self._paired or not is_rotated(name):
            return tensor
        return pair_order(tensor, self._head_dim)


class RandomWeights:
    """Seeded weights whose answers vary: for tests, and for benchmarks of other shapes."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `WeightSource`."""
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        values = torch.randn(shape, generator=self._generator)
        # Variance-preserving, a little below 1, so that depth does not blow activations up.
        return values if "embed" in name else values * 0.5 / float(shape[-1]) ** 0.5


def gguf_in_package(package: str) -> Iterator[Path]:
    """The .gguf files that an installed package ships."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        listed = files(package) or []
    except PackageNotFoundError:
        return
    yield from (Path(str(f.locate())) for f in listed if f.name.endswith(".gguf"))


def _error(message: str, path: Path, help: str = "") -> SageIRError:
    return SageIRError(Diagnostic(message, Location(str(path), 1), help=help))
