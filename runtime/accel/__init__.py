"""Attention over a paged KV cache that reads shared prefixes once, in Triton.

Importing this imports neither torch nor triton: the configuration is read where neither is
installed. `make_attention` does, and returns a
`sagellm_ir.runtime.accel.attention.PrefixAttention`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sagellm_ir.runtime.accel.config import AccelConfig
from sagellm_ir.runtime.accel.gate import Gate

if TYPE_CHECKING:
    from sagellm_ir.runtime.accel.forest import SharedPrefix, find_groups, shared_prefixes
    from sagellm_ir.runtime.accel.select import make_attention, why_not
    from sagellm_ir.runtime.accel.spec import AttentionSpec, unsupported

__all__ = [
    "AccelConfig",
    "AttentionSpec",
    "Gate",
    "SharedPrefix",
    "find_groups",
    "make_attention",
    "shared_prefixes",
    "unsupported",
    "why_not",
]

_HOMES = {
    "forest": ("SharedPrefix", "find_groups", "shared_prefixes"),
    "select": ("make_attention", "why_not"),
    "spec": ("AttentionSpec", "unsupported"),
}
"""What is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
