"""The options that watch passes at work, and what they print."""

from pathlib import Path
from typing import Annotated

import typer
from attrs import field, frozen

from sagellm_ir.cli import shared
from sagellm_ir.cli.help import flag
from sagellm_ir.passes.instruments import (
    Diff,
    Dump,
    Instrument,
    Reproducer,
    Statistics,
    Timing,
)

__all__ = ["REPRO", "DumpDir", "PrintDiff", "ReproFile", "ShowStatistics", "ShowTiming", "Watch"]

ShowTiming = Annotated[bool, flag("--timing", help="How long each pass took.")]
ShowStatistics = Annotated[bool, flag("--stats", help="What each pass did, how often.")]
PrintDiff = Annotated[bool, flag("--print-diff", help="What each pass changed.")]
DumpDir = Annotated[
    Path | None,
    typer.Option(
        "--dump-dir", metavar="DIR", help="Write the graph after each pass, and an index."
    ),
]
ReproFile = Annotated[
    Path, typer.Option("--repro", metavar="FILE", help="Where to write how to repeat a failure.")
]

REPRO = Path("repro.ir")
"""Where a reproducer goes when nothing else is said."""


@frozen
class Watch:
    """Instruments that the user asked for. Everything they say goes to stderr."""

    timing: Timing | None
    statistics: Statistics | None
    others: tuple[Instrument, ...] = field(factory=tuple)

    @classmethod
    def of(
        cls, timing: bool, statistics: bool, diff: bool, folder: Path | None, repro: Path
    ) -> "Watch":
        """From the options' values."""
        others: list[Instrument] = [Reproducer(repro)]
        if diff:
            others.append(Diff(lambda text: shared.stderr().print(text, markup=False, end="")))
        if folder is not None:
            others.append(Dump(folder))
        return cls(
            Timing() if timing else None, Statistics() if statistics else None, tuple(others)
        )

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """All of them, for a `PassManager`."""
        chosen = (self.timing, self.statistics, *self.others)
        return tuple(instrument for instrument in chosen if instrument is not None)

    def report(self) -> None:
        """Prints the tables, after the passes have run."""
        for tabled in (self.timing, self.statistics):
            if tabled is not None:
                shared.stderr().print(tabled.table())
