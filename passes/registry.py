"""The passes by name, as data. Nothing is imported until a pass is asked for."""

from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.passes.base import Pass

__all__ = ["GROUP", "PASSES", "find_pass", "pass_names"]

GROUP = "sagellm_ir.passes"
"""Entry-point group: an installed package adds `name = "module:Class"` here."""

PASSES: dict[str, str] = {
    "canonicalize": "sagellm_ir.passes.canonicalize:Canonicalize",
    "prefix-dedup": "sagellm_ir.passes.prefix_dedup:PrefixDedup",
    "kv-reuse": "sagellm_ir.passes.kv_reuse:KVReuse",
    "chunk-prefill": "sagellm_ir.passes.chunk_prefill:ChunkPrefill",
    "disaggregate": "sagellm_ir.passes.disaggregate:Disaggregate",
    "schedule": "sagellm_ir.passes.schedule:Schedule",
    "evict": "sagellm_ir.passes.evict:Evict",
    "comm-fusion": "sagellm_ir.passes.comm_fusion:CommFusion",
}
"""Our own passes, in the order in which pipelines usually run them."""


def pass_names() -> list[str]:
    """All names that `find_pass` knows: ours, then those of installed packages."""
    return [*PASSES, *sorted({entry.name for entry in entry_points(group=GROUP)} - PASSES.keys())]


def find_pass(name: str) -> type[Pass]:
    """The pass class called `name`.

    Raises:
        SageIRError: no such pass, or an installed package's entry does not hold one.
    """
    if path := PASSES.get(name):
        module, _, attribute = path.partition(":")
        ours: type[Pass] = getattr(import_module(module), attribute)
        return ours
    if entries := list(entry_points(group=GROUP, name=name)):
        return _load(entries[0])
    raise SageIRError(Diagnostic(f"no pass is called {name!r}", help=suggest(name, pass_names())))


def _load(entry: EntryPoint) -> type[Pass]:
    """The class an installed package's entry point names."""
    broken = partial(Diagnostic, help=f"fix or remove the package that provides {entry.value!r}")
    try:
        found = entry.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise SageIRError(broken(f"pass {entry.name!r} cannot be loaded: {reason}")) from error
    if not (isinstance(found, type) and issubclass(found, Pass) and found.name == entry.name):
        expected = f"a Pass class whose name is {entry.name!r}"
        raise SageIRError(broken(f"entry point {entry.value!r} is not {expected}"))
    return found
