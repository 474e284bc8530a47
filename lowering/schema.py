"""JSON Schemas (draft 2020-12), derived from the classes and their docstrings."""

import ast
import inspect
import textwrap
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import attrs

from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering.plan import PLAN_VERSION, ExecutionPlan
from sagellm_ir.lowering.serial import OPS
from sagellm_ir.nodes import KINDS, IRNode
from sagellm_ir.serial import JSON_VERSION

__all__ = ["DIALECT", "field_docs", "graph_schema", "plan_schema", "schema_of"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SCALARS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    NoneType: "null",
}

Schema = dict[str, Any]


def plan_schema() -> Schema:
    """The schema of a plan's JSON (`plan_to_json`)."""
    schema = schema_of(ExecutionPlan)
    schema["properties"]["version"] = {
        "const": PLAN_VERSION,
        "description": "Version of the format.",
    }
    schema["required"] = ["version", *schema["required"]]
    return schema


def graph_schema() -> Schema:
    """The schema of a graph's JSON (`graph_to_json`)."""
    definitions: dict[str, Schema] = {}
    graph = _refer(IRGraph, definitions)
    return {
        "$schema": DIALECT,
        "title": "IRGraph",
        "description": inspect.getdoc(IRGraph),
        "type": "object",
        "properties": {"sagellm_ir": {"const": JSON_VERSION}, "graph": graph},
        "required": ["sagellm_ir", "graph"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def schema_of(cls: type) -> Schema:
    """The schema of an attrs class as cattrs writes it: unknown members refused, defaults optional.

    Raises:
        TypeError: a field has a type that JSON cannot show.
    """
    definitions: dict[str, Schema] = {}
    _refer(cls, definitions)
    root = definitions.pop(cls.__name__)
    return {"$schema": DIALECT, "title": cls.__name__, **root, "$defs": definitions}


def _refer(cls: type, definitions: dict[str, Schema]) -> Schema:
    """A reference to a class, defined on the way when it is new."""
    name = cls.__name__
    if name not in definitions:
        definitions[name] = {}
        definitions[name] = (
            {
                "description": inspect.getdoc(cls),
                "oneOf": [_refer(kind, definitions) for kind in KINDS.values()],
            }
            if cls is IRNode
            else _object(cls, definitions)
        )
    return {"$ref": f"#/$defs/{name}"}


def _object(cls: type, definitions: dict[str, Schema]) -> Schema:
    texts = field_docs(cls)
    properties: dict[str, Schema] = {}
    required: list[str] = []
    if cls in OPS:
        properties["op"] = {"const": OPS[cls]}
        required.append("op")
    if issubclass(cls, IRNode):
        properties["kind"] = {"const": cls.kind}
        required.append("kind")
    for field in attrs.fields(cls):
        described: Schema = {"description": texts[field.name]} if field.name in texts else {}
        if names := getattr(field.validator, "names", None):
            described["enum"] = list(names)
        if type(field.default) in _SCALARS:
            described["default"] = field.default
        properties[field.name] = {**_schema(field.type, definitions), **described}
        if field.default is attrs.NOTHING:
            required.append(field.name)
    return {
        "description": inspect.getdoc(cls) or "",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _schema(hint: Any, definitions: dict[str, Schema]) -> Schema:
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if hint is bytes:
        return {"type": "string", "contentEncoding": "base64"}
    if attrs.has(hint):
        return _refer(hint, definitions)
    arguments = get_args(hint)
    if get_origin(hint) is tuple and arguments[1:] == (...,):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if get_origin(hint) in (Union, UnionType):
        if all(argument in _SCALARS for argument in arguments):
            return {"type": [_SCALARS[argument] for argument in arguments]}
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    raise TypeError(f"no JSON Schema for {hint}")


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstrings that stand under the fields of a class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef), body
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    texts[name] = inspect.cleandoc(words).replace("\n", " ")
    return texts
