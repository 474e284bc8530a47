"""Pipelines as text, both ways: `canonicalize,prefix-dedup,evict{policy=belady}` <-> passes.

pipeline := item ("," item)*
item     := preset | pass ["{" option ("," option)* "}"]
option   := key "=" value | key            a key alone is `key=true`
value    := anything without  , { } = " and blanks  |  a JSON string
"""

import json
import re
from collections.abc import Iterator
from itertools import takewhile
from types import NoneType
from typing import Any, get_args

import attrs

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.nodes import Location
from sagellm_ir.passes.base import Pass
from sagellm_ir.passes.registry import find_pass, pass_names

__all__ = ["PRESETS", "Pipeline", "print_pass"]

PRESETS: dict[str, str] = {
    "O0": "chunk-prefill,disaggregate,schedule,evict",
    "O1": "canonicalize,prefix-dedup,kv-reuse,O0",
    "O2": "canonicalize,prefix-dedup,kv-reuse,chunk-prefill,disaggregate,schedule,"
    "evict{policy=belady},comm-fusion",
    "O3": "canonicalize,prefix-dedup{gated=false},kv-reuse,chunk-prefill,disaggregate,schedule,"
    "evict{policy=belady},comm-fusion",
}
"""Ready-made pipelines. Each makes a scheduled graph of any verified built graph.

- `O0` is what running needs: a worker for each node, prefills that fit a step, steps, KV in its tiers.
- `O1` adds sharing: equal prefixes are computed once, and what the engine holds is not recomputed.
- `O2` adds what uses knowledge of the whole schedule: Belady's eviction, fused collectives.
- `O3` shares every equal block, also where the cost model sees no gain in time: least KV memory.
"""

_TOKEN = re.compile(r'\s*(?:(?P<word>[^\s,{}="]+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[,{}=]))')
_BARE = re.compile(r'[^\s,{}="]+')


@attrs.frozen
class Pipeline:
    """Passes in the order in which they run."""

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Pipeline":
        """The passes that a text names. Empty text is the empty pipeline.

        Raises:
            SageIRError: with a caret at the place that cannot be understood.
        """
        return cls(_Parser(text).pipeline())

    def __str__(self) -> str:
        """The text that parses back to an equal pipeline."""
        return ",".join(map(print_pass, self.passes))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def before(self, name: str) -> "Pipeline":
        """The passes that run before the first one called `name`: all, when none is."""
        return Pipeline(tuple(takewhile(lambda item: item.name != name, self.passes)))


def print_pass(item: Pass) -> str:
    """One pass as pipeline text: its name, and the options that differ from their default."""
    options = []
    for option in _options(type(item)).values():
        value = getattr(item, option.name)
        if value != option.default:
            options.append(f"{option.name}={_print_value(value)}")
    return item.name + (f"{{{', '.join(options)}}}" if options else "")


def _print_value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    plain = _BARE.fullmatch(value) and value not in ("none", "true", "false")
    return value if plain else json.dumps(value)


def _options(cls: type[Pass]) -> "dict[str, attrs.Attribute[Any]]":
    """The options of a pass by name."""
    return {option.name: option for option in attrs.fields(cls)}


def _convert(text: str, wanted: Any, quoted: bool) -> object:
    """Option text as a value of type `wanted`: a str, int, float or bool, or None for some.

    Raises:
        ValueError, KeyError: the text is no such value.
    """
    types = get_args(wanted) or (wanted,)
    if text == "none" and NoneType in types and not quoted:
        return None
    plain = next(t for t in types if t is not NoneType)
    if plain is bool:
        return {"true": True, "false": False}[text]
    return plain(text)


class _Parser:
    """A recursive descent over the tokens of one pipeline."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        """Where the current token starts."""
        self.end = 0
        self.kind = self.token = ""
        self.advance()

    def advance(self) -> str:
        """Returns the current token and moves to the next; the end is an empty token."""
        passed = self.token
        rest = self.text[self.end :]
        self.at = self.end + len(rest) - len(rest.lstrip())
        match = _TOKEN.match(self.text, self.end)
        if match:
            self.kind, self.end = match.lastgroup or "", match.end()
            self.token = match[self.kind]
        elif self.at < len(self.text):
            raise self.error("a quoted value has no end", 'close it with "')
        else:
            self.kind = self.token = ""
        return passed

    def error(self, message: str, fix: str = "", at: int | None = None) -> SageIRError:
        """A diagnostic with a caret at a place, else at the current token."""
        column = self.at if at is None else at
        line = re.sub(r"\s", " ", self.text)
        window = f"  {line}\n  {' ' * column}^"
        loc = Location("<pipeline>", 1, column + 1)
        return SageIRError(Diagnostic(message, loc=loc, window=window, help=fix))

    def expect(self, *marks: str) -> str:
        """Takes one of some punctuation marks."""
        if self.token not in marks or self.kind == "string":
            found = repr(self.token) if self.token else "the end"
            raise self.error(f"expected {' or '.join(map(repr, marks))}, found {found}")
        return self.advance()

    def word(self, what: str) -> str:
        """Takes a name."""
        if self.kind != "word":
            found = repr(self.token) if self.token else "the end"
            raise self.error(f"expected {what}, found {found}")
        return self.advance()

    def pipeline(self) -> tuple[Pass, ...]:
        """All items. No token at all is the empty pipeline."""
        passes = list(self.item()) if self.kind else []
        while self.kind:
            self.expect(",")
            passes += self.item()
        return tuple(passes)

    def item(self) -> tuple[Pass, ...]:
        """A pass, or the passes a preset stands for."""
        at, name = self.at, self.word("the name of a pass")
        if name in PRESETS:
            return _Parser(PRESETS[name]).pipeline()
        if name not in (known := pass_names()):
            fix = suggest(name, [*known, *PRESETS])
            raise self.error(f"no pass or preset is called {name!r}", fix, at)
        cls = find_pass(name)
        values: dict[str, object] = {}
        if self.token == "{":
            self.advance()
            while self.token != "}":
                self.option(cls, values)
                if self.token != "}":
                    self.expect(",", "}")
            self.advance()
        try:
            return (cls(**values),)
        except ValueError as error:
            raise self.error(f"pass {name!r}: {_reason(error)}", at=at) from error

    def option(self, cls: type[Pass], values: dict[str, object]) -> None:
        """Reads `key=value` or `key` into `values`."""
        at, key = self.at, self.word("the name of an option")
        if (option := _options(cls).get(key)) is None:
            fix = suggest(key, _options(cls)) or "it has no options"
            raise self.error(f"pass {cls.name!r} has no option {key!r}", fix, at)
        if key in values:
            raise self.error(f"option {key!r} is given twice", "keep one", at)
        text, quoted = "true", False
        if self.token == "=":
            self.advance()
            at, quoted = self.at, self.kind == "string"
            text = self.value()
        try:
            value = values[key] = _convert(text, option.type, quoted)
        except (ValueError, KeyError) as error:
            raise self.error(_bad_value(cls, option, text), at=at) from error
        try:
            if option.validator:
                option.validator(None, option, value)
        except ValueError as error:
            raise self.error(_bad_value(cls, option, text), _choices(error, text), at) from error

    def value(self) -> str:
        """Takes a value."""
        if self.kind == "string":
            at = self.at
            try:
                return str(json.loads(self.advance()))
            except ValueError as error:
                raise self.error("the quoted value is not a JSON string", at=at) from error
        return self.word("a value")


def _bad_value(cls: type[Pass], option: "attrs.Attribute[Any]", text: str) -> str:
    wanted = getattr(option.type, "__name__", None) or str(option.type)
    return f"option {option.name!r} of {cls.name!r} ({wanted}) cannot be {text!r}"


def _reason(error: ValueError) -> str:
    """The message of a ValueError; attrs validators put more than it into `args`."""
    return str(error.args[0]) if error.args else "invalid options"


def _choices(error: ValueError, text: str) -> str:
    """Help for a wrong value: the nearest of the choices, or what the validator said."""
    match error.args:
        case (_, _, (str(), *_) as choices, _):
            return suggest(text, choices)
    return _reason(error)
