"""What plans for a vLLM engine are compiled for, read from vLLM's own configuration."""

from typing import Any

from attrs import evolve
from cattrs import Converter, transform_error

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.accel import AccelConfig
from sagellm_ir.runtime.engines.vllm.blocks import NULL_BLOCKS
from sagellm_ir.runtime.engines.vllm.versions import CASCADE, check_version
from sagellm_ir.runtime.protocols.kv_schema import kv_dtype_of
from sagellm_ir.target import DEVICE, ModelSpec, Target, Tier, Worker

__all__ = [
    "ACCEL",
    "PLAN_NAME",
    "SESSION",
    "WORKER",
    "WORKER_CLASS",
    "accel_of",
    "option",
    "plan_name",
    "reads_once",
    "spec_of",
    "stored_as",
    "takes_groups",
    "target_of",
]

WORKER = "w0"
"""One vLLM engine is one worker."""
WORKER_CLASS = "sagellm_ir.runtime.engines.vllm.worker.PlanWorker"
ACCEL = "sagellm_accel"
"""Key of `additional_config` with fields of `AccelConfig`, for `PlanWorker`."""
PLAN_NAME = "sagellm_request"
"""Key of `SamplingParams.extra_args` with the name that plans use for a request."""
_STORED = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "fp8": "fp8_e4m3",
    "fp8_per_token_head": "fp8_e4m3",
    "int8_per_token_head": "int8",
}
SESSION = "sagellm_session"
"""Key of `SamplingParams.extra_args` with the session of a request."""


def plan_name(request: Any) -> str:
    """The name that plans use for vLLM's request; vLLM's own ids have random ends."""
    extra = request.sampling_params.extra_args or {}
    return str(extra.get(PLAN_NAME, request.request_id))


def option(vllm_config: Any, name: str, default: str) -> str:
    """One of ours in vLLM's `additional_config`."""
    options = vllm_config.additional_config or {}
    return str(options.get(name, default)) if isinstance(options, dict) else default


def accel_of(vllm_config: Any) -> AccelConfig:
    """How `PlanWorker` attends.

    Raises:
        SageIRError: what `additional_config` has of it is no `AccelConfig`.
    """
    options = vllm_config.additional_config or {}
    given = options.get(ACCEL, {}) if isinstance(options, dict) else {}
    try:
        return Converter(forbid_extra_keys=True).structure(given, AccelConfig)
    except Exception as error:  # cattrs raises whatever a value's constructor raises
        found = transform_error(error, path=ACCEL, format_exception=lambda cause, _: str(cause))
        wrong = "; ".join(found)
        raise SageIRError(Diagnostic(f"vLLM's additional_config: {wrong}")) from error


def reads_once(vllm_config: Any) -> bool:
    """Whether the workers' attention reads once what some rows of a decode share (`PlanWorker`)."""
    return bool(vllm_config.parallel_config.worker_cls == WORKER_CLASS)


def takes_groups(vllm_config: Any) -> bool:
    """Whether vLLM's attention can use that all rows of a forward share a prefix (cascade attention)."""
    return check_version() in CASCADE and not vllm_config.model_config.disable_cascade_attn


def stored_as(vllm_config: Any) -> str:
    """The type that KV is stored in, by the name that KV schemas use."""
    name = vllm_config.cache_config.cache_dtype
    model = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return kv_dtype_of(model) if name == "auto" else _STORED.get(name, name)


def spec_of(model_config: Any, cache: Any) -> ModelSpec:
    """The shape of vLLM's model over all tensor-parallel ranks; `cache` is its KV cache's spec."""
    text = model_config.hf_text_config
    heads = text.num_attention_heads
    width, size = model_config.get_head_size(), model_config.dtype.itemsize
    stored = cache.page_size_bytes // (2 * cache.num_kv_heads * cache.block_size)
    return ModelSpec(
        name=str(model_config.served_model_name or model_config.model),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=width,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        vocab=model_config.get_vocab_size(),
        dtype_bytes=size,
        kv_head_bytes=0 if stored == width * size else stored,
    )


def target_of(vllm_config: Any, kv_cache_config: Any) -> Target:
    """The target that a vLLM engine is.

    Speeds, which decide what is shared, moved or computed again, come from the preset (or file) that
    `--additional-config '{"sagellm_target": "h100"}'` names; without one, from its device's.

    Raises:
        SageIRError: plans cannot drive such an engine, or there is no such target.
    """
    _check(vllm_config, kv_cache_config)
    from vllm.platforms import current_platform

    usual = "vllm-cpu" if current_platform.device_type == "cpu" else "h100"
    base = load_target(option(vllm_config, "sagellm_target", usual))
    scheduler = vllm_config.scheduler_config
    cache = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    tiers = [evolve(_tier(base, DEVICE), blocks=kv_cache_config.num_blocks - NULL_BLOCKS)]
    transfer = vllm_config.kv_transfer_config
    others = transfer.get_from_extra_config("tiers", {}) if transfer else {}
    tiers += [evolve(_tier(base, name), blocks=blocks) for name, blocks in others.items()]
    return evolve(
        base,
        name=base.name,
        engine="vllm",
        block_size=cache.block_size,
        max_tokens=scheduler.max_num_batched_tokens,
        max_batch=scheduler.max_num_seqs,
        tp=vllm_config.parallel_config.tensor_parallel_size,
        mixed=True,
        model=spec_of(vllm_config.model_config, cache),
        tiers=tuple(tiers),
        workers=(Worker(WORKER),),
    )


def _tier(base: Target, name: str) -> Tier:
    return base.tier(name) or Tier(name, 0)


def _check(config: Any, kv_cache_config: Any) -> None:
    """Raise `SageIRError` for what `PlanScheduler` leaves out."""
    parallel = config.parallel_config
    transfer = config.kv_transfer_config
    wrong = {
        "several kinds of KV cache (sliding windows, state-space layers)": len(
            kv_cache_config.kv_cache_groups
        )
        != 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "vLLM's second model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": bool(
            getattr(config, "use_v2_model_runner", False)
        ),
        "an engine without PlanConnector as its KV connector": transfer is None
        or transfer.kv_connector != "PlanConnector",
    }
    found = [what for what, is_so in wrong.items() if is_so]
    if found:
        raise SageIRError(Diagnostic(f"plans cannot drive {', '.join(found)}"))
