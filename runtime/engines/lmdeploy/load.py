"""`load_lmdeploy`: a model in a patched LMDeploy that plans drive. Nothing is downloaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.embedded import load_tokenizer
from sagellm_ir.runtime.engines.embedded.export import model_folder
from sagellm_ir.runtime.engines.embedded.tokenizer import ModelTokenizer
from sagellm_ir.runtime.engines.lmdeploy.patching import status
from sagellm_ir.runtime.protocols import KVSchemaConfig
from sagellm_ir.runtime.protocols.kv_native import lmdeploy_quant_policy
from sagellm_ir.target import HOST, Target, Tier

__all__ = ["engine_settings", "load_engine", "load_lmdeploy"]


def load_lmdeploy(
    model: str,
    *,
    dtype: str = "bfloat16",
    target: str = "h100",
    overrides: Mapping[str, Any] | None = None,
    stop_at_eos: bool = True,
    kv_schema: KVSchemaConfig = KVSchemaConfig(),
    host_blocks: int = 0,
) -> LoadedBackend:
    """A model in LMDeploy's PyTorch engine, for `load_backend`.

    Args:
        model: a Hugging Face folder, a `.gguf` file, or a packaged model's name.
        dtype: of weights and activations, by its torch name.
        target: a preset or a YAML file: block size, budgets, tensor-parallel ranks, speeds. Its
            model and its tiers are replaced by what LMDeploy makes of the memory there is.
        overrides: fields of the target to change (see `load_target`).
        stop_at_eos: end an answer at the model's end token; else at the planned length.
        kv_schema: how KV is stored: in the model's type, or int8.
        host_blocks: of the host tier, which LMDeploy allocates at once.

    Raises:
        SageIRError: LMDeploy is not the patched v0.11.0, there is no GPU, there is no such model, or
            the target cannot be run.
    """
    chosen = load_target(target, **(overrides or {}))
    host = evolve(chosen.tier(HOST) or Tier(HOST, 0), blocks=host_blocks)
    tiers = (*(tier for tier in chosen.tiers if tier.name != HOST), host)
    tokenizer = load_tokenizer(model)
    with model_folder(model, dtype) as folder:
        backend = load_engine(
            folder,
            evolve(chosen, tiers=tiers),
            dtype,
            stop_at_eos=stop_at_eos,
            kv_schema=kv_schema,
            tokenizer=tokenizer,
        )
    from sagellm_ir.runtime.engines.lmdeploy.online import target_of

    name = Path(model).name
    fitted = target_of(backend.engine, chosen)
    fitted = evolve(fitted, model=evolve(fitted.model, name=name))
    return LoadedBackend(backend, fitted, tokenizer, name)


def load_engine(
    folder: Path,
    target: Target,
    dtype: str,
    *,
    stop_at_eos: bool = True,
    kv_schema: KVSchemaConfig = KVSchemaConfig(),
    tokenizer: ModelTokenizer | None = None,
) -> Any:
    """`LMDeployBackend` with the host tier of a target; of its device tier, LMDeploy chooses the size.

    Raises:
        SageIRError: see `load_lmdeploy`.
    """
    settings = engine_settings(target, dtype, kv_schema)
    _check()
    from sagellm_ir.runtime.config import load_config
    from sagellm_ir.runtime.engines.lmdeploy.engine import LMDeployBackend
    from sagellm_ir.runtime.engines.lmdeploy.plugin import prepare

    prepare(load_config())
    host = target.tier(HOST)
    settings["num_cpu_blocks"] = host.blocks if host else 0
    return LMDeployBackend.load(
        str(folder), stop_at_eos=stop_at_eos, tokenizer=tokenizer, **settings
    )


def engine_settings(
    target: Target, dtype: str, kv_schema: KVSchemaConfig = KVSchemaConfig()
) -> dict[str, Any]:
    """The fields of LMDeploy's `PytorchEngineConfig` that make it the engine of a target.

    Raises:
        SageIRError: LMDeploy cannot run such a target, or store KV like that.
    """
    if len(target.workers) != 1:
        raise SageIRError(
            Diagnostic(
                f"LMDeploy cannot run target {target.name!r}: it has {len(target.workers)} workers, "
                "and one engine is one worker",
                help="set workers to 1, and tp to the GPUs of the engine",
            )
        )
    return {
        "dtype": dtype,
        "tp": target.tp,
        "block_size": target.block_size,
        "max_batch_size": target.max_batch,
        "max_prefill_token_num": target.max_tokens,
        "prefill_interval": target.max_loops,
        "quant_policy": lmdeploy_quant_policy(kv_schema, dtype),
        "enable_prefix_caching": True,
    }


def _check() -> None:
    """Raise `SageIRError` unless a patched LMDeploy can run here."""
    import torch

    found = status("installed")
    if found.state != "patched":
        raise SageIRError(
            Diagnostic(
                f"LMDeploy in {found.root} is not patched ({found.state})",
                help="patch it: `sagellm-ir patches apply --target installed`",
            )
        )
    if not torch.cuda.is_available():
        message = "LMDeploy's PyTorch engine needs a CUDA device, and there is none"
        raise SageIRError(Diagnostic(message, help="use --backend embedded"))
