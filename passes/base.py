"""`Pass`: graph -> graph, its options as fields. `PassContext`: its counters and rewrite budget."""

import inspect
from abc import ABC, abstractmethod
from collections import Counter
from typing import ClassVar

from attrs import define, field, frozen

from sagellm_ir.graph import STAGES, IRGraph

__all__ = ["Pass", "PassContext"]


@define
class PassContext:
    """What one run of a pass may ask and tell. A pass keeps no state of its own."""

    budget: int | None = None
    """Rewrites allowed; None allows all. Used to bisect a wrong result to one rewrite, an idea of
    LLVM's OptBisect."""
    rewrites: int = 0
    """Rewrites made so far."""
    counts: Counter[str] = field(factory=Counter)
    """Statistics of this run: a short plural noun for each thing the pass did."""

    def may_rewrite(self) -> bool:
        """Takes one rewrite from the budget: False when none is left.

        Ask once before each rewrite that can be left out while the result stays valid. What a
        pass must do for its result to be legal (assigning steps, say) is not asked for.
        """
        allowed = self.budget is None or self.rewrites < self.budget
        self.rewrites += allowed
        return allowed

    def count(self, what: str, by: int = 1) -> None:
        """Adds to a counter."""
        self.counts[what] += by


@frozen
class Pass(ABC):
    """A rewrite of verified graphs, written as a frozen attrs class.

    Fields are the options, each with a default, so that a pipeline prints back to text. The
    docstring states the law of the pass; its first line is the summary that the CLI lists.
    No verifier-valid graph of a needed stage may make `run` raise, and the result verifies. The
    one exception is a `SageIRError` when the target cannot do what the graph asks for.
    """

    name: ClassVar[str]
    """As it is written in a pipeline: `prefix-dedup`."""
    needs: ClassVar[tuple[str, ...]] = STAGES
    """Stages the input may be in."""
    gives: ClassVar[str | None] = None
    """Stage of the result; None leaves it as it is."""

    @abstractmethod
    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        """The rewritten graph. Returns `graph` itself when there is nothing to do."""

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]
