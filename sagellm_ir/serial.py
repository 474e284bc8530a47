"""JSON of an `IRGraph`, by cattrs: every node carries its kind, and no key is ignored."""

import json
from functools import cache
from types import GenericAlias
from typing import Any, get_args, get_origin

from cattrs import BaseValidationError, Converter, transform_error
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn
from cattrs.v import format_exception

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import KINDS, IRNode, Location

__all__ = ["JSON_VERSION", "graph_from_json", "graph_to_json"]

JSON_VERSION = 1


def graph_to_json(graph: IRGraph, *, indent: int | None = None) -> str:
    """The graph as JSON: `{"sagellm_ir": 1, "graph": {...}}`, with locations and origins."""
    document = {"sagellm_ir": JSON_VERSION, "graph": _converter().unstructure(graph)}
    return json.dumps(document, indent=indent)


def graph_from_json(text: str, filename: str = "<json>") -> IRGraph:
    """Reads what `graph_to_json` wrote; `filename` is what errors name.

    Raises:
        SageIRError: the JSON is broken off or malformed, of another version, or not a graph.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        loc = Location(filename, error.lineno, error.colno)
        cut = error.pos >= len(text.rstrip())
        message = "the JSON ends too early: is it truncated?" if cut else f"not JSON: {error.msg}"
        raise SageIRError(Diagnostic(message, loc)) from None
    except (RecursionError, ValueError) as error:
        raise _error(f"not JSON that can be read: {error}", filename) from None
    if not isinstance(document, dict) or set(document) != {"sagellm_ir", "graph"}:
        raise _error("expected an object with the keys 'sagellm_ir' and 'graph'", filename)
    if not isinstance(document["graph"], dict):
        raise _error("expected an object under the key 'graph'", filename)
    if document["sagellm_ir"] != JSON_VERSION:
        raise _error(
            f"version {document['sagellm_ir']!r} of the JSON cannot be read: "
            f"expected version {JSON_VERSION}",
            filename,
        )
    try:
        return _converter().structure(document["graph"], IRGraph)
    except BaseValidationError as error:
        found = transform_error(error, path="graph", format_exception=_reason)
        raise _error("the JSON is not a graph", filename, tuple(found[:20])) from None


def _error(message: str, filename: str, notes: tuple[str, ...] = ()) -> SageIRError:
    return SageIRError(Diagnostic(message, Location(filename, 1), notes=notes))


def _reason(error: BaseException, cls: type | None) -> str:
    return str(error) if type(error) is ValueError else format_exception(error, cls)


@cache
def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True, omit_if_default=True)
    for scalar in (int, float, str, bool):
        converter.register_structure_hook(scalar, _exactly)
    converter.register_structure_hook_factory(_is_tuple, lambda cls: _tuple_hook(converter, cls))
    by_kind: dict[str, Any] = {}
    to_dict: dict[type[IRNode], Any] = {}
    for kind, cls in KINDS.items():
        by_kind[kind] = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)
        to_dict[cls] = make_dict_unstructure_fn(cls, converter, _cattrs_omit_if_default=True)

    def structure(value: Any, _: Any) -> IRNode:
        fields = dict(value) if isinstance(value, dict) else {}
        kind = fields.pop("kind", None)
        if not isinstance(kind, str) or kind not in by_kind:
            hint = suggest(str(kind), by_kind)
            raise ValueError(f"expected an object with the kind of a node, found {kind!r}; {hint}")
        node: IRNode = by_kind[kind](fields, KINDS[kind])
        return node

    def unstructure(node: IRNode) -> dict[str, Any]:
        return {"kind": node.kind, **to_dict[type(node)](node)}

    converter.register_structure_hook(IRNode, structure)
    converter.register_unstructure_hook_func(
        lambda cls: isinstance(cls, type) and issubclass(cls, IRNode), unstructure
    )
    return converter


def _is_tuple(cls: Any) -> bool:
    return get_origin(cls) is tuple


def _tuple_hook(converter: Converter, cls: Any) -> Any:
    """Tuples are JSON lists; nothing else that can be iterated will do."""
    items: Any = GenericAlias(list, get_args(cls)[:1])

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"expected a list, found {str(value)[:40]}")
        return tuple(converter.structure(value, items))

    return structure


def _exactly(value: Any, cls: Any) -> Any:
    """A scalar of the declared type; an integer will do where a float is declared."""
    if type(value) is cls:
        return value
    if cls is float and type(value) is int:
        return float(value)
    raise ValueError(f"expected {cls.__name__}, found {str(value)[:40]!r}")
