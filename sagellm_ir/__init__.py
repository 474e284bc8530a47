"""sagellm-ir: a compiler for LLM serving. Requests -> `IRGraph` -> passes -> `ExecutionPlan`."""

from sagellm_ir.graph import CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.nodes import KINDS, AllReduce, Decode, IRNode, KVFetch, KVMigrate, Prefill
from sagellm_ir.request import Request
from sagellm_ir.target import Target

__all__ = [
    "KINDS",
    "AllReduce",
    "CachedBlocks",
    "Decode",
    "IRGraph",
    "IRNode",
    "KVFetch",
    "KVMigrate",
    "Prefill",
    "Request",
    "RequestDecl",
    "Target",
]
