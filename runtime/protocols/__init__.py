"""What engines, schedulers and storage say to each other: one definition of each type. Imports no torch."""

from sagellm_ir.runtime.protocols.capability import (
    DEVICE_KINDS,
    DOMESTIC,
    CapabilityDescriptor,
)
from sagellm_ir.runtime.protocols.kv_native import lmdeploy_quant_policy, vllm_kv_cache_dtype
from sagellm_ir.runtime.protocols.kv_schema import KVCacheSchema, KVSchemaConfig

__all__ = [
    "DEVICE_KINDS",
    "DOMESTIC",
    "CapabilityDescriptor",
    "KVCacheSchema",
    "KVSchemaConfig",
    "lmdeploy_quant_policy",
    "vllm_kv_cache_dtype",
]
