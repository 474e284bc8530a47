"""What a KV schema is called in other engines' own configurations."""

from typing import NoReturn

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.protocols.kv_config import KVSchemaConfig
from sagellm_ir.runtime.protocols.kv_schema import kv_dtype_of

__all__ = ["lmdeploy_quant_policy", "vllm_kv_cache_dtype"]

_VLLM = {
    "cpu": {"fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"},
    "cuda": {
        "bf16": "bfloat16",
        "fp16": "float16",
        "fp8_e4m3": "fp8_per_token_head",
        "fp8_e5m2": "fp8_e5m2",
        "int8": "int8_per_token_head",
    },
}
"""By device: what vLLM's attention there can read. Its CPU kernels have one scale for all tokens."""


def lmdeploy_quant_policy(schema: KVSchemaConfig, model_dtype: str) -> int:
    """The `quant_policy` of LMDeploy's `PytorchEngineConfig`.

    0 keeps KV in the model's type; 8 is int8 with a scale and a zero point a token and head.

    Args:
        schema: what the user asks for.
        model_dtype: the model's type, by its torch name.

    Raises:
        SageIRError: LMDeploy v0.11.0 cannot store KV like that.
    """
    dtype = schema.resolve(model_dtype)
    policies = {kv_dtype_of(model_dtype): 0, "int8": 8}
    if dtype not in policies:
        _refuse("LMDeploy v0.11.0", dtype, list(policies))
    return policies[dtype]


def vllm_kv_cache_dtype(schema: KVSchemaConfig, model_dtype: str, device: str) -> str:
    """The `kv_cache_dtype` of vLLM.

    Args:
        schema: what the user asks for.
        model_dtype: the model's type, by its torch name.
        device: "cpu" or "cuda".

    Raises:
        SageIRError: vLLM cannot store KV like that on this device.
    """
    dtype = schema.resolve(model_dtype)
    names = {kv_dtype_of(model_dtype): "auto"} | {
        kv: name for kv, name in _VLLM.get(device, {}).items() if kv != kv_dtype_of(model_dtype)
    }
    if dtype not in names:
        _refuse(f"vLLM on {device}", dtype, list(names))
    return names[dtype]


def _refuse(engine: str, dtype: str, known: list[str]) -> NoReturn:
    message = f"{engine} cannot store KV as {dtype}"
    raise SageIRError(Diagnostic(message, help=f"this model's KV there: {', '.join(known)}"))
