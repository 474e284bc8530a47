"""`Instrument`: watches the passes of a pipeline. `PassRun`: what there is to see of one pass."""

from collections.abc import Mapping

from attrs import field, frozen

from sagellm_ir.graph import IRGraph
from sagellm_ir.passes.base import Pass

__all__ = ["Instrument", "PassRun"]


@frozen
class PassRun:
    """One pass at work. Before it has finished, `result` is the input and the rest is empty."""

    index: int
    """Place in the pipeline, from 1."""
    item: Pass
    graph: IRGraph
    """The input."""
    result: IRGraph = field()
    counts: Mapping[str, int] = field(factory=dict)
    """Statistics: what the pass did, how often."""
    rewrites: int = 0
    """Rewrites it took from the budget."""
    seconds: float = 0.0
    """Wall time of the pass itself."""
    verify_seconds: float = 0.0
    """Wall time of verifying its result."""

    @result.default
    def _unchanged(self) -> IRGraph:
        return self.graph

    @property
    def changed(self) -> bool:
        """Whether the pass changed anything: computed, not promised."""
        return self.result != self.graph


class Instrument:
    """A watcher of passes: override what is of interest. Nothing may be written to stdout."""

    def before(self, run: PassRun) -> None:
        """A pass is about to run."""

    def after(self, run: PassRun) -> None:
        """A pass has run and its result is valid. Called in reverse order of instruments."""

    def failed(self, run: PassRun, error: Exception) -> str | None:
        """A pass crashed or its result is invalid. Returns a note for the user, or None."""
        return None
