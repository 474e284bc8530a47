"""`Fields`: one record's fields, read with checks whose messages name the field."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.nodes import Location

__all__ = ["Fields"]

_SHOWN = 40
_LARGEST = 10**18 - 1
"""No count, id or time of a request needs more than 18 digits."""


class Fields:
    """Reads the fields of one record. A null field counts as absent.

    Every reader takes the names a field may have. Readers raise `SageIRError`: the location, the
    field, what was expected and what was there.
    """

    __slots__ = ("loc", "prefix", "read", "values")

    def __init__(self, values: Mapping[str, Any], loc: Location, prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix
        self.loc = loc
        self.read: set[str] = set()

    def get(self, *names: str) -> tuple[str, Any]:
        """The name that is present and its value; `(names[0], None)` when none is."""
        found, value = names[0], None
        for name in names:
            if name in self.values:
                self.read.add(name)
                other = self.values[name]
                if other is None:
                    continue
                if value is not None and value != other:
                    self.fail(name, f"it differs from {found!r}, which means the same")
                found, value = name, other
        return found, value

    def integer(self, *names: str, default: int | None = None, least: int | None = None) -> Any:
        """A whole number, `least` or more, of 18 digits at most."""
        name, value = self.get(*names)
        if value is None:
            return default
        low = -_LARGEST if least is None else least
        if type(value) is not int or not low <= value <= _LARGEST:
            huge = type(value) is int and abs(value) > _LARGEST
            bound = " of at most 18 digits" if huge else _at_least(least)
            self.expected(name, f"a whole number{bound}", value)
        return value

    def required(self, name: str, least: int) -> int:
        """A whole number, `least` or more, that must be there."""
        value: int | None = self.integer(name, least=least)
        if value is None:
            self.expected(name, f"a whole number of at least {least}", None)
        return value

    def number(self, *names: str, default: float | None = None, most: float = _LARGEST) -> Any:
        """A number in `[0, most]`."""
        name, value = self.get(*names)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 <= value <= most:
            self.expected(name, f"a number from 0 to {most:g}", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """`true` or `false`."""
        value = self.get(name)[1]
        if value is not None and not isinstance(value, bool):
            self.expected(name, "true or false", value)
        return default if value is None else value

    def text(self, *names: str) -> str | None:
        """A text that is not empty."""
        name, value = self.get(*names)
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            self.expected(name, "a text that is not empty", value)
        return self.sound(name, value)

    def sound(self, name: str, value: str) -> str:
        """`value`, unless it holds half of a surrogate pair, which no encoding has."""
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                self.fail(name, "the text holds half of a surrogate pair (\\ud800 to \\udfff)")
        return value

    def integers(self, name: str, value: Any, what: str, most: int) -> tuple[int, ...]:
        """A list of whole numbers in `[0, most]`."""
        if not isinstance(value, list):
            self.expected(name, what, value)
        if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) > most):
            at = next(i for i, v in enumerate(value) if type(v) is not int or not 0 <= v <= most)
            self.expected(f"{name}[{at}]", f"a whole number from 0 to {most}", value[at])
        return tuple(value)

    def unread(self) -> Iterable[str]:
        """Names of the fields that nobody asked for, in order."""
        return (name for name in self.values if name not in self.read)

    def expected(self, name: str, what: str, value: Any) -> NoReturn:
        """Raises: `name` should have been `what`."""
        huge = type(value) is int and abs(value) > _LARGEST
        shown = "a larger one" if huge else repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
        self.fail(name, f"expected {what}, got {shown}")

    def fail(self, name: str, message: str, help_: str = "") -> NoReturn:
        """Raises: something is wrong with the field `name` of this record."""
        raise SageIRError(Diagnostic(f"{self.prefix}{name}: {message}", self.loc, help=help_))


def _at_least(least: int | None) -> str:
    return "" if least is None else f" of at least {least}"
