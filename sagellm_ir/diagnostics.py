"""`Diagnostic`: what was wrong, where, and how to fix it. `SageIRError` carries some to the user."""

import difflib
from collections.abc import Iterable

from attrs import frozen

from sagellm_ir.nodes.base import Location

__all__ = ["Diagnostic", "SageIRError", "suggest"]


@frozen
class Diagnostic:
    """One finding."""

    message: str
    """What was wrong and what was expected, in one sentence."""
    loc: Location | None = None
    severity: str = "error"
    window: str = ""
    """The lines around the finding, with a caret or an arrow at it."""
    notes: tuple[str, ...] = ()
    help: str = ""
    """How to fix it."""

    def __str__(self) -> str:
        where = f"{self.loc}: " if self.loc else ""
        lines = [f"{where}{self.severity}: {self.message}"]
        lines += [self.window] if self.window else []
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"help: {self.help}"] if self.help else []
        return "\n".join(lines)


class SageIRError(Exception):
    """Wrong input. Every error a user can cause is one of these, or of a subclass."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        super().__init__("\n".join(str(diagnostic) for diagnostic in diagnostics))
        self.diagnostics = diagnostics


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` when a known word is near, else the list of known words."""
    names = sorted(known)
    if near := difflib.get_close_matches(word, names, n=1):
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names)}" if names else ""
