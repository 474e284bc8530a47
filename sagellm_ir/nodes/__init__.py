"""The node kinds: one file each; `KINDS` maps a kind's name in the text to its class."""

from sagellm_ir.nodes.allreduce import AllReduce, collective, payload
from sagellm_ir.nodes.base import IRNode, KVNode, Location, Origin
from sagellm_ir.nodes.decode import Decode
from sagellm_ir.nodes.kv_fetch import KVFetch
from sagellm_ir.nodes.kv_migrate import KVMigrate
from sagellm_ir.nodes.prefill import Prefill

__all__ = [
    "KINDS",
    "AllReduce",
    "Decode",
    "IRNode",
    "KVFetch",
    "KVMigrate",
    "KVNode",
    "Location",
    "Origin",
    "Prefill",
    "collective",
    "payload",
]

KINDS: dict[str, type[IRNode]] = {
    cls.kind: cls for cls in (Prefill, Decode, KVFetch, KVMigrate, AllReduce)
}
