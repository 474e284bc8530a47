"""Plans as JSON, and back: deterministic to write, strict to read.

One request or step a line, keys in the order of the classes, defaults left out.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from attrs import fields
from cattrs import Converter, ForbiddenExtraKeysError, transform_error
from cattrs.gen import make_dict_unstructure_fn, override

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.files import write_atomic
from sagellm_ir.lowering.plan import PLAN_VERSION, ExecutionPlan, KVFree, KVMove
from sagellm_ir.nodes.base import Location
from sagellm_ir.target import Device, ModelSpec, Target, Tier, Worker

__all__ = ["MAX_BYTES", "OPS", "load_plan", "plan_from_json", "plan_to_json", "save_plan"]

MAX_BYTES = 1 << 30
"""The longest text that is read."""
OPS: dict[type, str] = {KVMove: "move", KVFree: "free"}
"""The value of `op` that tells the KV actions of a step apart."""
_LINES = ("requests", "steps")
_MOST_ERRORS = 20


def plan_to_json(plan: ExecutionPlan) -> str:
    """The plan as JSON text; equal plans give equal text."""
    data = {"version": plan.version, **_CONVERTER.unstructure(plan)}
    return "{\n" + ",\n".join(_members(data)) + "\n}\n"


def plan_from_json(text: str, filename: str = "<plan>") -> ExecutionPlan:
    """The plan that `plan_to_json` wrote. Its laws are `verify_plan`'s to check.

    Raises:
        SageIRError: broken JSON (with line and column), another version, or a member that is
            unknown, missing or of a wrong type (with its path).
    """
    if len(text) > MAX_BYTES:
        raise _error(f"the plan is longer than {MAX_BYTES} bytes", Location(filename, 1))
    start = Location(filename, 1)
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = Location(filename, error.lineno, error.colno)
        raise _error(f"not JSON: {error.msg}", where, "is the file complete?") from error
    except (RecursionError, ValueError) as error:
        raise _error(f"JSON that cannot be read: {error}", start) from error
    if not isinstance(data, dict) or "version" not in data:
        raise _error("a plan is a JSON object that begins with its version", start)
    if data["version"] != PLAN_VERSION:
        raise _error(
            f"a plan of version {data['version']!r}, and this release reads {PLAN_VERSION}",
            start,
            "compile the requests again",
        )
    try:
        return _CONVERTER.structure(data, ExecutionPlan)
    except RecursionError as error:
        raise _error("nested too deeply", start) from error
    except Exception as error:  # cattrs raises groups of whatever the hooks raised
        found = transform_error(error, path="$", format_exception=_explain)
        diagnostics = (Diagnostic(message, start) for message in found[:_MOST_ERRORS])
        raise SageIRError(*diagnostics) from error


def save_plan(plan: ExecutionPlan, path: Path) -> None:
    """Write a plan whole or not at all.

    Raises:
        SageIRError: the file cannot be written.
    """
    write_atomic(path, plan_to_json(plan))


def load_plan(path: Path) -> ExecutionPlan:
    """Read a plan file.

    Raises:
        SageIRError: it cannot be read, or holds no plan.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _error(f"the plan is longer than {MAX_BYTES} bytes", Location(str(path), 1))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _error(f"cannot read the plan: {error.strerror}", Location(str(path), 1)) from error
    except UnicodeDecodeError as error:
        raise _error("the plan is not UTF-8 text", Location(str(path), 1)) from error
    return plan_from_json(text, str(path))


def _members(data: dict[str, Any]) -> Iterator[str]:
    for key, value in data.items():
        if key in _LINES:
            items = ",\n".join(json.dumps(item) for item in value)
            yield f'"{key}": [\n{items}\n]'
        else:
            yield f'"{key}": {json.dumps(value)}'


def _exactly(kind: type) -> Callable[[Any, Any], Any]:
    """A hook that takes values of a type as they are and refuses others."""

    def check(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, got {value!r:.60}")
        return value

    return check


def _number(value: Any, _: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"expected a finite number, got {value!r:.60}")
    return float(value)


def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True, omit_if_default=True)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_structure_hook(float, _number)
    # A target is written whole: its defaults may change from release to release.
    rare = {"kv_head_bytes": override(omit_if_default=True)}
    for cls in (ModelSpec, Device, Tier, Worker, Target):
        some: dict[str, Any] = {
            name: rule for name, rule in rare.items() if hasattr(fields(cls), name)
        }
        whole = make_dict_unstructure_fn(cls, converter, _cattrs_omit_if_default=False, **some)
        converter.register_unstructure_hook(cls, whole)
    for action, op in OPS.items():
        plain: Callable[[Any], dict[str, Any]] = make_dict_unstructure_fn(
            action, converter, _cattrs_omit_if_default=True
        )
        converter.register_unstructure_hook(action, partial(_tag, op, plain))

    def action_of(value: Any, _: Any) -> Any:
        members = dict(value) if isinstance(value, dict) else {}
        op = members.pop("op", None)
        for action, name in OPS.items():
            if op == name:
                return converter.structure(members, action)
        raise ValueError(f"no KV action {op!r}: {suggest(str(op), OPS.values())}")

    converter.register_structure_hook(KVMove | KVFree, action_of)
    return converter


def _tag(op: str, plain: Callable[[Any], dict[str, Any]], action: Any) -> dict[str, Any]:
    return {"op": op, **plain(action)}


def _explain(error: BaseException, kind: type | None) -> str:
    """One sentence about one error inside a plan."""
    if isinstance(error, ForbiddenExtraKeysError):
        known = [field.name for field in getattr(error.cl, "__attrs_attrs__", ())]
        return "; ".join(
            f"unknown member {key!r}: {suggest(key, known)}" for key in sorted(error.extra_fields)
        )
    if isinstance(error, KeyError):
        return f"member {error.args[0]!r} is missing"
    return str(error) or f"expected {kind}"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _error(message: str, loc: Location, help: str = "") -> SageIRError:
    return SageIRError(Diagnostic(message, loc, help=help))


_CONVERTER = _converter()
