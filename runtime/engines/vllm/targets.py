"""What plans for a vLLM engine are compiled for, read from vLLM's own configuration."""

from typing import Any

from attrs import evolve

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.engines.vllm.blocks import NULL_BLOCKS
from sagellm_ir.target import DEVICE, ModelSpec, Target, Tier, Worker

__all__ = ["PLAN_NAME", "SESSION", "WORKER", "plan_name", "spec_of", "target_of"]

WORKER = "w0"
"""One vLLM engine is one worker."""
PLAN_NAME = "sagellm_request"
"""Key of `SamplingParams.extra_args` with the name that plans use for a request."""
SESSION = "sagellm_session"
"""Key of `SamplingParams.extra_args` with the session of a request."""


def plan_name(request: Any) -> str:
    """The name that plans use for vLLM's request; vLLM's own ids have random ends."""
    extra = request.sampling_params.extra_args or {}
    return str(extra.get(PLAN_NAME, request.request_id))


def spec_of(model_config: Any) -> ModelSpec:
    """The shape of vLLM's model, over all tensor-parallel ranks."""
    text = model_config.hf_text_config
    heads = text.num_attention_heads
    return ModelSpec(
        name=str(model_config.served_model_name or model_config.model),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=model_config.get_head_size(),
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        vocab=model_config.get_vocab_size(),
        dtype_bytes=model_config.dtype.itemsize,
    )


def target_of(vllm_config: Any, kv_cache_config: Any, base: Target | None = None) -> Target:
    """The target that a vLLM engine is; speeds come from `base` (a preset of its device).

    Raises:
        SageIRError: plans cannot drive such an engine.
    """
    _check(vllm_config, kv_cache_config)
    base = base or Target()
    scheduler = vllm_config.scheduler_config
    tiers = [evolve(_tier(base, DEVICE), blocks=kv_cache_config.num_blocks - NULL_BLOCKS)]
    transfer = vllm_config.kv_transfer_config
    others = transfer.get_from_extra_config("tiers", {}) if transfer else {}
    tiers += [evolve(_tier(base, name), blocks=blocks) for name, blocks in others.items()]
    return evolve(
        base,
        name=f"vllm-{base.name}",
        engine="vllm",
        block_size=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
        max_tokens=scheduler.max_num_batched_tokens,
        max_batch=scheduler.max_num_seqs,
        tp=vllm_config.parallel_config.tensor_parallel_size,
        mixed=True,
        model=spec_of(vllm_config.model_config),
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
        "asynchronous scheduling": config.scheduler_config.async_scheduling,
        "vLLM's second model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": bool(
            getattr(config, "use_v2_model_runner", False)
        ),
        "an engine without PlanConnector as its KV connector": transfer is None
        or transfer.kv_connector != "PlanConnector",
    }
    found = [what for what, is_so in wrong.items() if is_so]
    if found:
        raise SageIRError(Diagnostic(f"plans cannot drive {', '.join(found)}"))
