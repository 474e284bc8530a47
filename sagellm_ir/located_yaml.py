"""`LocatedYAML`: a YAML file that knows the line of each field, and fills attrs classes strictly."""

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import GenericAlias
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml
from attrs import Attribute, field, fields, frozen
from cattrs import BaseValidationError, Converter, ForbiddenExtraKeysError

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.nodes import Location

__all__ = ["LocatedYAML", "Where", "one_of", "yaml_value"]

_MOST_BYTES = 1 << 20

T = TypeVar("T")
Where = tuple[str | int, ...]
"""The path to a field: keys and list indexes."""


class _BadValue(ValueError):
    """A value of the wrong type."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for its many booleans: a bare `off`, `no` or `y` is a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _names(known: Iterable[str]) -> tuple[str, ...]:
    return tuple(known)


@frozen
class one_of:
    """A validator for texts that takes one of a few, and suggests the nearest."""

    names: tuple[str, ...] = field(converter=_names)

    def __call__(self, _: Any, attribute: "Attribute[Any]", value: Any) -> None:
        if value not in self.names:
            expected = ", ".join(self.names)
            hint = suggest(str(value), self.names) if value else ""
            hint = f"; {hint}" if hint.startswith("did") else ""
            raise ValueError(f"'{attribute.name}' expected one of {expected}; got {value!r}{hint}")


def yaml_value(text: str | bytes) -> Any:
    """What a YAML text means; raises `yaml.YAMLError` or `ValueError` when it is none."""
    return yaml.load(text, _Loader)


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


def _bytes(value: Any, _: type) -> bytes:
    """Base64."""
    if not isinstance(value, str):
        raise _BadValue(f"expected a base64 text, got {value!r:.40}")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        raise _BadValue(f"expected a base64 text: {error}") from None


def _converter() -> Converter:
    """Strict: no unknown fields, no silent conversions."""
    converter = Converter(forbid_extra_keys=True)
    hooks = (
        *((int, _integer), (float, _number), (str, _text), (bool, _boolean)),
        (bytes, _bytes),
    )
    for cls, hook in hooks:
        converter.register_structure_hook(cls, hook)
    converter.register_structure_hook_factory(_is_tuple, lambda cls: _tuple_hook(converter, cls))
    return converter


def _is_tuple(cls: Any) -> bool:
    return get_origin(cls) is tuple


def _tuple_hook(converter: Converter, cls: Any) -> Callable[[Any, Any], Any]:
    """Only a list will do: a text can be iterated too."""
    items: Any = GenericAlias(list, get_args(cls)[:1])

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise _BadValue(f"expected a list, got {value!r}")
        return tuple(converter.structure(value, items))

    return structure


_CONVERTER = _converter()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_MOST_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SageIRError(Diagnostic(f"cannot read {path}: {reason}")) from error


class LocatedYAML:
    """A YAML file: its mapping, and the line each field is on."""

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        """
        Args:
            path: the file; what errors name.
            data: its text, when it is no file; JSON reads as YAML.

        Raises:
            SageIRError: it cannot be read, or is no YAML mapping.
        """
        self.path = path
        self.lines: dict[Where, Location | None] = {}
        self._sources: dict[Where, str] = {}
        data = _read(path) if data is None else data
        if len(data) > _MOST_BYTES:
            raise SageIRError(Diagnostic(f"{path} is larger than {_MOST_BYTES} bytes"))
        try:
            for event in yaml.parse(data, _Loader):
                # A few aliases of aliases can stand for a billion values.
                if isinstance(event, yaml.AliasEvent):
                    message = "aliases (*name) are not supported"
                    raise SageIRError(Diagnostic(message, self._loc(event)))
            tree = yaml.compose(data, _Loader)
            self._index(tree, ())
            self.values = yaml_value(data)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            loc = Location(str(path), mark.line + 1, mark.column + 1) if mark else None
            # Of a file that is not UTF-8, PyYAML tells the byte and where it is in "<byte string>".
            unread = isinstance(error, yaml.reader.ReaderError)
            reason = "not a text" if unread else getattr(error, "problem", None) or str(error)
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
        source = self._sources.get(where, self.path.stem)
        return Diagnostic(text if loc else f"{source}: {text}", loc, help=help_)

    def forget(self, overrides: Mapping[str, Any], where: Where = ()) -> None:
        """Overridden fields are not what the file says, so no message may point there."""
        for name, value in overrides.items():
            self.lines.pop((*where, name), None)
            if isinstance(value, Mapping):
                self.forget(value, (*where, name))

    def override(self, where: Where, source: str) -> None:
        """The field at `where` comes from elsewhere: messages name `source` instead of a line."""
        self.lines = {at: loc for at, loc in self.lines.items() if at[: len(where)] != where}
        self._sources[where] = source

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
