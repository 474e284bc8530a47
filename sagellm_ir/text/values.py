"""What stands inside a line of the text: names, strings, attributes and lists."""

import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

from lark import Token

from sagellm_ir.diagnostics import suggest
from sagellm_ir.graph import IRGraph
from sagellm_ir.text.errors import Fault
from sagellm_ir.text.syntax import Attribute, attributes_of

__all__ = [
    "MAX_INTS",
    "NAME",
    "node_attributes",
    "position",
    "read_attributes",
    "unquote",
    "value_names",
]

MAX_INTS = 1 << 25
"""Integers that all lists of a text may hold together: a range is short, what it means is not."""

STRING = r'"(?:[^"\\\n]|\\.)*"'
NAME = rf"(?:([A-Za-z0-9_.\-]+)|({STRING}))"
_ONE_OPERAND = re.compile(r"\(%([A-Za-z0-9_.\-]+)\)[ \t]*")
_VALUE_NAME = re.compile(rf"[ \t]*%{NAME}[ \t]*(,|\)|$)")
_A_NAME = re.compile(rf"[ \t]*%{NAME}")
_PAIR = re.compile(
    rf"[ \t]*([A-Za-z_]\w*)[ \t]*=[ \t]*({STRING}|\[[^\]\n]*\]|[^\s,\[\]{{}}\"]+)[ \t]*(,|\}})"
)
_INT = re.compile(r"-?\d{1,18}")
_RANGE = re.compile(r"[ \t]*(-?\d{1,18})(?:[ \t]*:[ \t]*(-?\d{1,18}))?[ \t]*(,|\])")
_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


def position(token: Token) -> int:
    """Where a token starts. Lark always knows; its type says it may not."""
    return token.start_pos or 0


def value_names(token: Token, at: int) -> tuple[str, ...]:
    """`%a, %b`, from offset `at` of a token to its end or its `)`."""
    if at == 1 and (one := _ONE_OPERAND.fullmatch(token)):
        return (one[1],)
    if at == 1 and not token[1:].strip(" \t)"):
        return ()
    names, more = [], ","
    while more == ",":
        found = _VALUE_NAME.match(token, at)
        if not found:
            name = _A_NAME.match(token, at)
            wanted = "',' or ')'" if name else "a value such as %p"
            raise Fault(
                position(token) + _past_blanks(token, name.end() if name else at),
                f"expected {wanted}",
            )
        bare, quoted, more = found.groups()
        names.append(bare or unquote(quoted, position(token) + at))
        at = found.end()
    return tuple(names)


def _past_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t"):
        at += 1
    return at


def unquote(quoted: str, at: int) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError as error:
        raise Fault(at, f"not a valid string: {error}", width=len(quoted)) from None


@lru_cache(maxsize=4096)
def node_attributes(cls: type, block: str) -> Mapping[str, Any]:
    """Blocks such as `{step = 3}` stand on many nodes."""
    return read_attributes(cls, block)


@cache
def _by_text(cls: type) -> dict[str, Attribute]:
    found = {attribute.text: attribute for attribute in attributes_of(cls)}
    return {"stage": found["stage"]} if cls is IRGraph else found


def read_attributes(cls: type, block: str) -> dict[str, Any]:
    """`{key = value, ...}` as fields of a class. Faults are relative to the block."""
    known = _by_text(cls)
    fields: dict[str, Any] = {}
    at, more = 1, ","
    while more == ",":
        pair = _PAIR.match(block, at)
        if not pair:
            raise Fault(_past_blanks(block, at), "expected 'name = value', then ',' or '}'")
        key, value, more = pair.groups()
        attribute = known.get(key)
        if attribute is None:
            raise Fault(
                pair.start(1),
                f"unknown attribute {key!r}",
                width=len(key),
                help=suggest(key, known),
            )
        if attribute.field in fields:
            raise Fault(pair.start(1), f"attribute {key!r} is given twice", width=len(key))
        fields[attribute.field] = _value(attribute, value, pair.start(2))
        at = pair.end()
    return fields


def _value(attribute: Attribute, text: str, at: int) -> Any:
    if attribute.optional and text == "none":
        return None
    if attribute.type == "int" and _INT.fullmatch(text):
        return int(text)
    if attribute.type == "str":
        if text[0] == '"':
            return unquote(text, at)
        if _BARE.fullmatch(text):
            return text
    if attribute.type == "bool" and text in ("true", "false"):
        return text == "true"
    if attribute.type == "float":
        try:
            return float(text)
        except ValueError:
            pass  # the fault below says what was expected
    if attribute.type == "ints" and text[0] == "[":
        return _ints(text, at)
    wanted = {
        "int": "an integer of at most 18 digits",
        "float": "a number",
        "bool": "true or false",
        "str": "a word or a quoted string",
        "ints": "a list of integers such as [0:33, 40]",
    }[attribute.type]
    raise Fault(at, f"{attribute.text}: expected {wanted}, found {text[:40]}", width=len(text))


def _ints(text: str, at: int) -> tuple[int, ...]:
    """`[0:33, 40]`."""
    if not text[1:-1].strip():
        return ()
    values: list[int] = []
    offset, more = 1, ","
    while more == ",":
        found = _RANGE.match(text, offset)
        if not found:
            raise Fault(
                at + _past_blanks(text, offset), "expected an integer or a range such as 0:33"
            )
        first, stop, more = found.groups()
        if stop is None:
            values.append(int(first))
        else:
            if int(stop) - int(first) + len(values) > MAX_INTS:
                raise Fault(at + offset, f"a text may list at most {MAX_INTS} integers")
            values.extend(range(int(first), int(stop)))
        offset = found.end()
    return tuple(values)
