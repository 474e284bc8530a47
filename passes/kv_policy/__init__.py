"""Victim policies of `evict`: one file each. Other packages add theirs by an entry point."""

from importlib.metadata import entry_points

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.passes.kv_policy.base import Entry, KVPolicy, Victims
from sagellm_ir.passes.kv_policy.belady import Belady
from sagellm_ir.passes.kv_policy.cost import Cost
from sagellm_ir.passes.kv_policy.fifo import FIFO
from sagellm_ir.passes.kv_policy.lfu import LFU
from sagellm_ir.passes.kv_policy.lru import LRU

__all__ = [
    "ENTRY_POINTS",
    "POLICIES",
    "Entry",
    "KVPolicy",
    "Victims",
    "make_policy",
    "policy_names",
]

POLICIES: dict[str, type[KVPolicy]] = {cls.name: cls for cls in (Belady, LRU, LFU, FIFO, Cost)}

ENTRY_POINTS = "sagellm_ir.kv_policies"
"""Entry-point group of policies that other packages bring: name -> subclass of `KVPolicy`."""


def policy_names() -> tuple[str, ...]:
    """All names that `make_policy` knows: ours, then those of installed packages."""
    others = {point.name for point in entry_points(group=ENTRY_POINTS)} - POLICIES.keys()
    return (*POLICIES, *sorted(others))


def make_policy(name: str) -> KVPolicy:
    """A fresh policy.

    Raises:
        SageIRError: there is no policy of that name, or its entry point is no `KVPolicy`.
    """
    if name in POLICIES:
        return POLICIES[name]()
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        hint = suggest(name, policy_names())
        raise SageIRError(Diagnostic(f"there is no eviction policy {name!r}", help=hint))
    cls = found[name].load()
    if not (isinstance(cls, type) and issubclass(cls, KVPolicy)):
        message = f"eviction policy {name!r} is {found[name].value}, which is no KVPolicy"
        raise SageIRError(Diagnostic(message, help="subclass sagellm_ir.passes.kv_policy.KVPolicy"))
    return cls()
