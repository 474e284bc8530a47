"""Every type that engines, schedulers and storage exchange: JSON Schemas and `docs/protocols.md`."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import attrs

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.lowering.schema import (
    DIALECT,
    field_docs,
    graph_schema,
    plan_schema,
    schema_of,
)
from sagellm_ir.nodes import KINDS, IRNode
from sagellm_ir.runtime.accel import AccelConfig, Gate
from sagellm_ir.runtime.backend import InferenceBackend, PlanSource
from sagellm_ir.runtime.config import SageConfig
from sagellm_ir.runtime.protocols.capability import CapabilityDescriptor
from sagellm_ir.runtime.protocols.comm import CommBackendProtocol
from sagellm_ir.runtime.protocols.kv_backend import KVBackendProtocol
from sagellm_ir.runtime.protocols.kv_config import KVSchemaConfig
from sagellm_ir.runtime.protocols.kv_schema import KVCacheSchema
from sagellm_ir.runtime.protocols.quantization import QuantizationProfile
from sagellm_ir.runtime.protocols.transport import KVChunk, TransportEngine

__all__ = ["DATA", "INTERFACES", "document", "every_schema", "schema"]

DATA: tuple[type, ...] = (
    CapabilityDescriptor,
    KVCacheSchema,
    KVSchemaConfig,
    QuantizationProfile,
    KVChunk,
    AccelConfig,
    SageConfig,
    ExecutionPlan,
    IRGraph,
    IRNode,
)
"""What is written as JSON."""
INTERFACES: tuple[type, ...] = (
    InferenceBackend,
    PlanSource,
    KVBackendProtocol,
    CommBackendProtocol,
    TransportEngine,
)
"""What is called."""


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a type of `DATA`.

    Raises:
        SageIRError: none is called so, or it is an interface.
    """
    for cls in DATA:
        if cls.__name__ == name:
            special = {ExecutionPlan: plan_schema, IRGraph: graph_schema}
            return special[cls]() if cls in special else schema_of(cls)
    if name in [cls.__name__ for cls in INTERFACES]:
        message = f"{name} is an interface: it is called, and never written as JSON"
        help_ = "its members: docs/protocols.md, or `x-interfaces` of `sagellm-ir schema dump`"
        raise SageIRError(Diagnostic(message, help=help_))
    known = [cls.__name__ for cls in DATA]
    raise SageIRError(Diagnostic(f"no type is called {name!r}", help=suggest(name, known)))


def every_schema() -> dict[str, Any]:
    """All of them in one document, under `$defs`; and what interfaces ask for, under `x-interfaces`."""
    definitions: dict[str, Any] = {}
    for cls in DATA:
        made = schema(cls.__name__)
        del made["$schema"]
        inner = made.pop("$defs")
        if cls is IRGraph:  # The file's schema speaks of the graph itself by this name.
            definitions["IRGraphFile"] = made
        else:
            definitions[cls.__name__] = made
        definitions.update({name: text for name, text in inner.items() if name not in definitions})
    return {
        "$schema": DIALECT,
        "title": "sagellm-ir protocols",
        "$defs": definitions,
        "x-interfaces": {
            cls.__name__: {
                "description": inspect.getdoc(cls),
                "members": {name: text for name, text, _ in _members(cls)},
            }
            for cls in INTERFACES
        },
    }


def document() -> str:
    """`docs/protocols.md`."""
    parts = [
        "# Protocols",
        "The types that engines, schedulers and storage exchange. Each has one definition, in the "
        "file named with it; this page is made from them by `make docs`. "
        "`sagellm-ir schema dump` prints their JSON Schema.",
        "## Data",
    ]
    for cls in (*DATA, *KINDS.values(), Gate):
        parts += _data_section(cls)
    parts.append("## Interfaces")
    for cls in INTERFACES:
        parts += [_heading(cls), inspect.getdoc(cls) or ""]
        rows = [f"| `{call}` | {_cell(text)} |" for _, text, call in _members(cls)]
        parts.append("\n".join(["| member | what it does |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _heading(cls: type) -> str:
    path = cls.__module__.replace("sagellm_ir.", "", 1).replace(".", "/")
    inner = path.partition("/")[0] in ("runtime", "lowering", "passes")
    return f"### {cls.__name__}\n\n`{path if inner else 'sagellm_ir/' + path}.py`"


def _data_section(cls: type) -> Iterator[str]:
    yield _heading(cls)
    yield inspect.getdoc(cls) or ""
    texts = field_docs(cls)
    rows = [
        f"| `{field.name}` | `{_cell(_type(field.type))}` | {_default(field)} | "
        f"{_cell(texts.get(field.name, ''))} |"
        for field in attrs.fields(cls)
    ]
    yield "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])


def _members(cls: type) -> Iterator[tuple[str, str, str]]:
    """(name, docstring, how it is called) of what an interface asks for."""
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            assert member.fget is not None
            returns = inspect.signature(member.fget).return_annotation
            yield name, inspect.getdoc(member) or "", f"{name}: {_type(returns)}"
        elif inspect.isfunction(member):
            text = str(inspect.signature(member)).replace("(self, ", "(").replace("(self)", "()")
            yield name, inspect.getdoc(member) or "", name + _short(text)


def _type(hint: Any) -> str:
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
    return _short(str(hint) if "[" in str(hint) else text)


def _short(text: str) -> str:
    """Names without their modules, and without the quotes of forward references."""
    return re.sub(r"\b(?:\w+\.)+(\w)", r"\1", text).replace("'", "").replace("NoneType", "None")


def _default(field: "attrs.Attribute[Any]") -> str:
    if field.metadata.get("from_ports"):
        return "of `SagePorts`"
    default = field.default
    if default is attrs.NOTHING:
        return "required"
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return f"`{getattr(default, 'factory').__name__}()`"  # noqa: B009
    if attrs.has(type(default)):
        return f"`{type(default).__name__}()`"
    return f"`{default!r}`" if len(repr(default)) < 60 else "see the source"


def _cell(text: str) -> str:
    """Text that may stand in a table."""
    return re.sub(r"\s+", " ", text.partition("\n\nRaises:")[0]).replace("|", "\\|")
