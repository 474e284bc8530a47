"""`LocatedYAML`: a YAML file that knows the line of each field, and fills attrs classes strictly."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from attrs import fields
from cattrs import BaseValidationError, Converter, ForbiddenExtraKeysError

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.nodes import Location

__all__ = ["LocatedYAML", "Where"]

_MOST_BYTES = 1 << 20

T = TypeVar("T")
Where = tuple[str | int, ...]
"""The path to a field: keys and list indexes."""


class _BadValue(ValueError):
    """A value of the wrong type."""


def _integer(value: Any, _: type) -> int:
    """A whole number; YAML writes large ones as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise _BadValue(f"expected a whole number, got {value!r}")
    return value


def _number(value: Any, _: type) -> float:
    """A finite number; YAML 1.1 takes 1e9 (without `.` and sign) for a text."""
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise _BadValue(f"expected a number, got {value!r}")
    return number


def _text(value: Any, _: type) -> str:
    if not isinstance(value, str) or not value:
        raise _BadValue(f"expected a text, got {value!r}")
    return value


def _boolean(value: Any, _: type) -> bool:
    if not isinstance(value, bool):
        raise _BadValue(f"expected true or false, got {value!r}")
    return value


def _converter() -> Converter:
    """Strict: no unknown fields, no silent conversions."""
    converter = Converter(forbid_extra_keys=True)
    for cls, hook in ((int, _integer), (float, _number), (str, _text), (bool, _boolean)):
        converter.register_structure_hook(cls, hook)
    return converter


_CONVERTER = _converter()


class LocatedYAML:
    """A YAML file: its mapping, and the line each field is on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Where, Location | None] = {}
        try:
            with path.open("rb") as stream:
                data = stream.read(_MOST_BYTES + 1)
        except OSError as error:
            reason = error.strerror or str(error)
            raise SageIRError(Diagnostic(f"cannot read {path}: {reason}")) from error
        if len(data) > _MOST_BYTES:
            raise SageIRError(Diagnostic(f"{path} is larger than {_MOST_BYTES} bytes"))
        try:
            for event in yaml.parse(data, yaml.SafeLoader):
                # A few aliases of aliases can stand for a billion values.
                if isinstance(event, yaml.AliasEvent):
                    message = "aliases (*name) are not supported"
                    raise SageIRError(Diagnostic(message, self._loc(event)))
            tree = yaml.compose(data, yaml.SafeLoader)
            self._index(tree, ())
            self.values = yaml.safe_load(data)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            loc = Location(str(path), mark.line + 1, mark.column + 1) if mark else None
            reason = getattr(error, "problem", None) or str(error)
            raise SageIRError(Diagnostic(f"{path} is not YAML: {reason}", loc)) from error
        if not isinstance(self.values, dict) or not all(isinstance(k, str) for k in self.values):
            raise SageIRError(Diagnostic(f"{path}: expected a mapping from fields to values"))

    def _loc(self, at: yaml.Node | yaml.Event) -> Location | None:
        mark = at.start_mark
        return Location(str(self.path), mark.line + 1, mark.column + 1) if mark else None

    def _index(self, node: yaml.Node | None, where: Where) -> None:
        """Notes where every field is, and refuses a field that is given twice."""
        if node is None:
            return
        self.lines[where] = self._loc(node)
        if isinstance(node, yaml.SequenceNode):
            for at, item in enumerate(node.value):
                self._index(item, (*where, at))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*where, str(key.value))
                if inner in self.lines:
                    self.lines[inner] = self._loc(key)
                    self.fail(inner, "this field is given twice")
                self._index(value, inner)

    def diagnostic(
        self, where: Where, message: str, help_: str = "", missing: bool = False
    ) -> Diagnostic:
        """Something is wrong with the field at `where`, or it is missing there."""
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
        loc = self.lines.get(where) or (self.lines.get(where[:-1]) if missing else None)
        text = f"{name[1:]}: {message}" if name else message
        return Diagnostic(text if loc else f"{self.path.stem}: {text}", loc, help=help_)

    def forget(self, overrides: Mapping[str, Any], where: Where = ()) -> None:
        """Overridden fields are not what the file says, so no message may point there."""
        for name, value in overrides.items():
            self.lines.pop((*where, name), None)
            if isinstance(value, Mapping):
                self.forget(value, (*where, name))

    def fail(self, where: Where, message: str, help_: str = "") -> NoReturn:
        """Raises the diagnostic."""
        raise SageIRError(self.diagnostic(where, message, help_))

    def structure(self, values: Any, cls: type[T], where: Where) -> T:
        """`values` as a `cls`; every wrong field is one diagnostic."""
        if not isinstance(values, Mapping):
            self.fail(where, f"expected a mapping, got {values!r}")
        try:
            return _CONVERTER.structure(values, cls)
        except BaseValidationError as error:
            raise SageIRError(*self._problems(error, where)) from error

    def _problems(self, error: BaseValidationError, where: Where) -> Iterator[Diagnostic]:
        for inner in error.exceptions:
            notes = getattr(inner, "__notes__", ())
            steps = [getattr(note, "name", getattr(note, "index", None)) for note in notes]
            place = (*where, *(step for step in steps if step is not None))
            if isinstance(inner, ForbiddenExtraKeysError):
                known = [attribute.name for attribute in fields(inner.cl)]
                for name in sorted(map(str, inner.extra_fields)):
                    yield self.diagnostic((*place, name), "unknown field", suggest(name, known))
            elif isinstance(inner, BaseValidationError):
                yield from self._problems(inner, place)
            elif isinstance(inner, KeyError):
                yield self.diagnostic(place, "this field is missing", missing=True)
            else:
                # A validator of attrs names the field at the start: "'tp' must be > 0: 0".
                # An AttributeError or TypeError is cattrs' own: it found no fields to look at.
                ours = isinstance(inner, ValueError)
                message = str(inner.args[0]) if ours else "expected a mapping"
                if named := re.match(r"'(\w+)' ", message):
                    place, message = (*place, named[1]), message[named.end() :]
                yield self.diagnostic(place, message)
