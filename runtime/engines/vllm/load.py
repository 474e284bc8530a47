"""`load_vllm`: a model in a vLLM engine that plans drive. Nothing is downloaded."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, evolve

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.accel import AccelConfig
from sagellm_ir.runtime.config import load_config
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.embedded import load_tokenizer
from sagellm_ir.runtime.engines.embedded.export import model_folder
from sagellm_ir.runtime.engines.vllm.blocks import NULL_BLOCKS
from sagellm_ir.runtime.engines.vllm.engine import BLOCK_MULTIPLES, VLLMBackendAdapter
from sagellm_ir.runtime.engines.vllm.targets import ACCEL, WORKER_CLASS
from sagellm_ir.runtime.engines.vllm.versions import KERNELS, check_version
from sagellm_ir.runtime.protocols import KVSchemaConfig
from sagellm_ir.runtime.protocols.kv_native import vllm_kv_cache_dtype
from sagellm_ir.target import DEVICE, Target

__all__ = ["engine_settings", "load_vllm", "make_engine"]

SCHEDULER = "sagellm_ir.runtime.engines.vllm.scheduler.PlanScheduler"
CONNECTOR = "sagellm_ir.runtime.engines.vllm.connector"
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are the user's to place: OMP_NUM_THREADS, taskset
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""What vLLM reads while it starts, where the user has not said otherwise."""
REQUIRED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler must be in this process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second runner takes changed block tables in another way
}
"""What plans need of vLLM, whatever the user has said."""


def load_vllm(
    model: str,
    *,
    dtype: str = "float32",
    target: str = "vllm-cpu",
    overrides: Mapping[str, Any] | None = None,
    stop_at_eos: bool = True,
    kv_schema: KVSchemaConfig = KVSchemaConfig(),
) -> LoadedBackend:
    """A model in vLLM, for `load_backend`.

    Args:
        model: a Hugging Face folder, a `.gguf` file, or a packaged model's name.
        dtype: of weights and activations, by its torch name.
        target: a preset or a YAML file: pool, block size, budgets, tensor-parallel ranks. Its model
            is replaced by the real one.
        overrides: fields of the target to change (see `load_target`).
        stop_at_eos: end an answer at the model's end token; else at the planned length.
        kv_schema: how KV is stored.

    Which attention runs on a GPU, the configuration says (`load_config`).

    Raises:
        SageIRError: an untested vLLM, a target, a model or a KV schema that it cannot run, or what
            `load_target` and `load_tokenizer` raise.
    """
    chosen = load_target(target, **(overrides or {}))
    with model_folder(model, dtype) as folder:
        accel = load_config().accel
        engine = make_engine(folder, chosen, dtype=dtype, kv_schema=kv_schema, accel=accel)
    backend = VLLMBackendAdapter(engine, stop_at_eos=stop_at_eos)
    spec = evolve(backend.target.model, name=model)
    fitted = evolve(chosen, engine="vllm", model=spec, workers=backend.target.workers)
    return LoadedBackend(backend, fitted, load_tokenizer(model), model, spill=True)


def make_engine(
    folder: Path,
    target: Target,
    *,
    dtype: str = "float32",
    kv_schema: KVSchemaConfig = KVSchemaConfig(),
    accel: AccelConfig = AccelConfig(),
    **settings: Any,
) -> Any:
    """vLLM's `LLMEngine` with `PlanScheduler`, its core in this process.

    Args:
        folder: a Hugging Face folder.
        target: pool, block size, budgets, tensor-parallel ranks.
        dtype: of weights and activations.
        kv_schema: how KV is stored.
        accel: which attention runs on a GPU.
        settings: more fields of vLLM's `EngineArgs`, or others than ours.

    Raises:
        SageIRError: an untested vLLM, or a target or model that it cannot run.
    """
    check_version()
    with _environment():
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        try:
            ours = engine_settings(folder, target, dtype, kv_schema, accel)
            arguments = EngineArgs(**ours | settings)
            return LLMEngine.from_engine_args(arguments)
        except ValueError as error:
            raise SageIRError(Diagnostic(f"vLLM cannot run {str(folder)!r}: {error}")) from error


def engine_settings(
    folder: Path,
    target: Target,
    dtype: str,
    kv_schema: KVSchemaConfig = KVSchemaConfig(),
    accel: AccelConfig = AccelConfig(),
) -> dict[str, Any]:
    """The fields of vLLM's `EngineArgs` that make it the engine of a target.

    Raises:
        SageIRError: vLLM cannot run such a target, or store KV like that.
    """
    from transformers import AutoConfig
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    device = current_platform.device_type
    pool = _device_blocks(target, BLOCK_MULTIPLES.get(device, 16))
    config = AutoConfig.from_pretrained(folder)
    ours = current_platform.is_cuda() and check_version() in KERNELS
    longest = min(config.max_position_embeddings, pool * target.block_size)
    return {
        "model": str(folder),
        "dtype": dtype,
        "skip_tokenizer_init": not (folder / "tokenizer.json").exists(),
        "max_model_len": longest,
        "block_size": target.block_size,
        "num_gpu_blocks_override": pool + NULL_BLOCKS,
        "kv_cache_memory_bytes": (pool + NULL_BLOCKS) * _block_bytes(config, target, dtype),
        "kv_cache_dtype": vllm_kv_cache_dtype(kv_schema, dtype, device),
        "max_num_seqs": target.max_batch,
        "max_num_batched_tokens": target.max_tokens,
        "tensor_parallel_size": target.tp,
        "distributed_executor_backend": "mp" if target.tp > 1 else "uni",
        "enable_prefix_caching": False,  # sharing is the plan's
        "enforce_eager": device == "cpu",
        "disable_log_stats": True,
        "scheduler_cls": SCHEDULER,
        "worker_cls": WORKER_CLASS if ours else "auto",
        "additional_config": {ACCEL: asdict(accel)},
        "kv_transfer_config": KVTransferConfig(
            kv_connector="PlanConnector",
            kv_connector_module_path=CONNECTOR,
            kv_role="kv_both",
            kv_connector_extra_config={
                "tiers": {t.name: t.blocks for t in target.tiers if t.name != DEVICE}
            },
        ),
    }


def _block_bytes(config: Any, target: Target, dtype: str) -> int:
    """Bytes of a KV block in one rank, over all layers, in the model's type: the most it can be."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    elements = 2 * config.num_hidden_layers * max(heads // target.tp, 1) * width * target.block_size
    return int(elements * getattr(torch, dtype).itemsize)


def _device_blocks(target: Target, multiple: int) -> int:
    """The size of the pool, after the checks of a target."""
    tier = target.tier(DEVICE)
    problem = ""
    if tier is None:
        problem = f"it has no tier {DEVICE!r}"
    elif target.block_size % multiple:
        problem = f"its blocks of {target.block_size} tokens are no multiple of {multiple}"
    elif len(target.workers) != 1:
        problem = f"it has {len(target.workers)} workers, and one vLLM engine is one worker"
    if tier is None or problem:
        raise SageIRError(
            Diagnostic(
                f"vLLM cannot run target {target.name!r}: {problem}",
                help=f"set block_size to a multiple of {multiple} and workers to 1",
            )
        )
    return tier.blocks


@contextmanager
def _environment() -> Iterator[None]:
    """vLLM's settings that are environment variables, for as long as it starts."""
    wanted = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()} | REQUIRED
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
