"""What engines, schedulers and storage say to each other: one definition of each type. Imports no torch."""

from sagellm_ir.runtime.protocols.capability import (
    DEVICE_KINDS,
    DOMESTIC,
    CapabilityDescriptor,
)
from sagellm_ir.runtime.protocols.comm import CommBackendProtocol
from sagellm_ir.runtime.protocols.kv_backend import KVBackendProtocol
from sagellm_ir.runtime.protocols.kv_config import KVSchemaConfig
from sagellm_ir.runtime.protocols.kv_native import lmdeploy_quant_policy, vllm_kv_cache_dtype
from sagellm_ir.runtime.protocols.kv_schema import KV_DTYPES, KVCacheSchema
from sagellm_ir.runtime.protocols.quantization import QuantizationProfile
from sagellm_ir.runtime.protocols.transport import KVChunk, TransportEngine

__all__ = [
    "DEVICE_KINDS",
    "DOMESTIC",
    "KV_DTYPES",
    "CapabilityDescriptor",
    "CommBackendProtocol",
    "KVBackendProtocol",
    "KVCacheSchema",
    "KVChunk",
    "KVSchemaConfig",
    "QuantizationProfile",
    "TransportEngine",
    "lmdeploy_quant_policy",
    "vllm_kv_cache_dtype",
]
