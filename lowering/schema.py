"""JSON Schemas (draft 2020-12), derived from the classes and their docstrings."""

import ast
import inspect
import textwrap
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import attrs

from sagellm_ir.lowering.plan import PLAN_VERSION, ExecutionPlan
from sagellm_ir.lowering.serial import OPS

__all__ = ["DIALECT", "plan_schema", "schema_of"]

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
        definitions[name] = _object(cls, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _object(cls: type, definitions: dict[str, Schema]) -> Schema:
    hints, texts = get_type_hints(cls), _field_docs(cls)
    properties: dict[str, Schema] = {}
    required: list[str] = []
    if cls in OPS:
        properties["op"] = {"const": OPS[cls]}
        required.append("op")
    for field in attrs.fields(cls):
        described = {"description": texts[field.name]} if field.name in texts else {}
        properties[field.name] = {**_schema(hints[field.name], definitions), **described}
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
def _field_docs(cls: type) -> dict[str, str]:
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
