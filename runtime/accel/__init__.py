"""Attention over a paged KV cache that reads shared prefixes once, in Triton.

Nothing here imports triton; `make_attention` does, and returns a
`sagellm_ir.runtime.accel.attention.PrefixAttention`.
"""

from sagellm_ir.runtime.accel.config import AccelConfig, load_accel
from sagellm_ir.runtime.accel.forest import SharedPrefix, find_groups, shared_prefixes
from sagellm_ir.runtime.accel.gate import Gate
from sagellm_ir.runtime.accel.select import make_attention, why_not
from sagellm_ir.runtime.accel.spec import AttentionSpec, unsupported

__all__ = [
    "AccelConfig",
    "AttentionSpec",
    "Gate",
    "SharedPrefix",
    "find_groups",
    "load_accel",
    "make_attention",
    "shared_prefixes",
    "unsupported",
    "why_not",
]
