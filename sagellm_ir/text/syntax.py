"""What parser and printer share: names, quoting, and which fields of a class are attributes."""

import json
import re
from collections.abc import Sequence
from functools import cache
from operator import sub
from types import NoneType, UnionType
from typing import Any, get_args

import attrs

from sagellm_ir.nodes import IRNode, KVNode

__all__ = [
    "TEXT_VERSION",
    "Attribute",
    "are_simple",
    "attributes_of",
    "format_name",
    "format_value",
]

TEXT_VERSION = 1
"""The version the first line of a text names."""

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_BARE = re.compile(r"(?!(?:true|false|none|inf|nan)$)[A-Za-z_][A-Za-z0-9_.\-]*")
_SCHEDULE = ("step", "until", "worker")
"""What a schedule adds to a node: printed last, in this order."""
_TYPES: dict[Any, str] = {int: "int", float: "float", bool: "bool", str: "str"}
_TYPES[tuple[int, ...]] = "ints"


@attrs.frozen
class Attribute:
    """One `key = value` of the text."""

    field: str
    """The attrs field it sets."""
    text: str
    """Its key in the text."""
    type: str
    """`int`, `float`, `bool`, `str` or `ints`."""
    optional: bool
    """Whether `none` is a value."""
    default: Any
    """`attrs.NOTHING` when the attribute must be written."""


@cache
def attributes_of(cls: type) -> tuple[Attribute, ...]:
    """The attributes of a node or declaration class, in the order they are printed.

    Its own fields come first, then inherited ones, then the schedule's. The first field of a
    class is its name (`%x`, `@x`) and the span of a KV node stands before its operands, so neither
    is an attribute.

    Raises:
        TypeError: a node class has a field that the text cannot show.
    """
    found = []
    base = IRNode if issubclass(cls, IRNode) else object
    shown_elsewhere = {field.name for field in attrs.fields(KVNode)} - set(_SCHEDULE)
    for field in sorted(attrs.fields(cls)[1:], key=_rank):
        if base is IRNode and field.name in shown_elsewhere:
            continue
        type_name, optional = _type_of(field.type)
        if type_name:
            text = field.metadata.get("text", field.name)
            found.append(Attribute(field.name, text, type_name, optional, field.default))
        elif base is IRNode:
            raise TypeError(f"{cls.__name__}.{field.name}: the text has no form for {field.type}")
    return tuple(found)


def _rank(field: Any) -> tuple[int, bool]:
    in_schedule = field.name in _SCHEDULE
    return (_SCHEDULE.index(field.name) + 1 if in_schedule else 0, field.inherited)


def _type_of(annotation: Any) -> tuple[str | None, bool]:
    optional = isinstance(annotation, UnionType) and NoneType in get_args(annotation)
    if optional:
        plain = [arg for arg in get_args(annotation) if arg is not NoneType]
        annotation = plain[0] if len(plain) == 1 else None
    return _TYPES.get(annotation), optional


def format_name(name: str) -> str:
    """A name as it stands after `%` or `@`: quoted unless it is simple."""
    return name if _NAME.fullmatch(name) else json.dumps(name)


def are_simple(names: Sequence[str]) -> bool:
    """Whether no name needs quotes: one look at all, since nearly all names are simple."""
    letters = "".join(names)
    for mark in "_.-":
        letters = letters.replace(mark, "")
    return all(names) and letters.isascii() and (letters.isalnum() or not letters)


def format_value(value: Any, type_name: str) -> str:
    """An attribute's value as the text shows it; `type_name` as in `Attribute.type`."""
    if value is None:
        return "none"
    if type_name == "int":
        return str(int(value))
    if type_name == "str":
        return value if _BARE.fullmatch(value) else json.dumps(value)
    if type_name == "ints":
        return f"[{_runs(value)}]"
    return repr(float(value)) if type_name == "float" else str(value).lower()


def _runs(values: tuple[int, ...]) -> str:
    """Integers with every ascending run of three or more written `first:last+1`."""
    gaps = tuple(map(sub, values[1:], values))
    last = len(gaps)
    if last > 2 and gaps[-1] != 1 and gaps.count(1) == last - 1:
        # Most prompts: what is shared, then a block of their own. Hot.
        return f"{values[0]}:{values[0] + last}, {values[last]}"
    starts = [0, *(i for i, gap in enumerate(gaps, 1) if gap != 1)] if values else []
    parts: list[str] = []
    for start, stop in zip(starts, [*starts[1:], len(values)], strict=True):
        if stop - start > 2:
            parts.append(f"{values[start]}:{values[start] + stop - start}")
        else:
            parts += map(str, values[start:stop])
    return ", ".join(parts)
