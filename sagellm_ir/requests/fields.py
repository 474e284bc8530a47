"""`Fields`: one record's fields, read with checks whose messages name the field."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.nodes import Location

__all__ = ["Fields"]

_SHOWN = 40


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
        """A whole number, `least` or more."""
        name, value = self.get(*names)
        if value is None:
            return default
        if type(value) is not int or (least is not None and value < least):
            bound = "" if least is None else f" of at least {least}"
            self.expected(name, f"a whole number{bound}", value)
        return value

    def required(self, name: str, least: int) -> int:
        """A whole number, `least` or more, that must be there."""
        value: int | None = self.integer(name, least=least)
        if value is None:
            self.expected(name, f"a whole number of at least {least}", None)
        return value

    def number(
        self, *names: str, default: float | None = None, least: float = 0.0, most: float = math.inf
    ) -> Any:
        """A finite number in `[least, most]`."""
        name, value = self.get(*names)
        if value is None:
            return default
        if type(value) not in (int, float) or not (least <= value <= most) or math.isinf(value):
            top = "" if most == math.inf else f" and at most {most:g}"
            self.expected(name, f"a number of at least {least:g}{top}", value)
        return value

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
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
        self.fail(name, f"expected {what}, got {shown}")

    def fail(self, name: str, message: str, help_: str = "") -> NoReturn:
        """Raises: something is wrong with the field `name` of this record."""
        raise SageIRError(Diagnostic(f"{self.prefix}{name}: {message}", self.loc, help=help_))
