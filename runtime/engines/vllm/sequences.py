"""One request inside `PlanScheduler`, and the rows of a forward."""

from collections.abc import Mapping
from typing import Any

from attrs import define, frozen

from sagellm_ir.lowering.plan import PlanStep
from sagellm_ir.runtime.backend import Finish, RequestView

__all__ = ["Row", "Sequence", "rows_of"]


@define(eq=False)
class Sequence:
    """A request as plans know it, around vLLM's own record of it."""

    name: str
    request: Any
    """vLLM's `Request`."""
    most: int
    """Tokens that its answer may have."""
    computed: int = 0
    pending: int = 0
    """Tokens that forwards in flight will give it: one at most."""
    sent: int | None = None
    """Blocks of its table that the workers have; None: they do not know it yet."""
    finish: Finish | None = None

    @property
    def known(self) -> int:
        """Tokens of its prompt and its answer so far, those in flight included."""
        return int(self.request.num_tokens) + self.pending

    @property
    def answered(self) -> int:
        """Tokens of its answer so far, those in flight included."""
        return int(self.request.num_output_tokens) + self.pending

    def view(self) -> RequestView:
        """For the planner."""
        request = self.request
        return RequestView(
            self.name,
            request.num_prompt_tokens,
            self.computed,
            self.answered,
            self.most,
            self.finish,
            self.pending,
        )


@frozen
class Row:
    """Tokens `[start, stop)` of a sequence in one forward."""

    sequence: Sequence
    start: int
    stop: int
    decode: bool
    samples: bool
    """Whether it gives the sequence its next token."""

    @classmethod
    def of(cls, sequence: Sequence, start: int, stop: int, decode: bool = False) -> "Row":
        """As the sequence is before the forward."""
        return cls(sequence, start, stop, decode, stop == sequence.known)


def rows_of(step: PlanStep, sequences: Mapping[str, Sequence]) -> list[Row]:
    """The rows of the next forward of a step, all of its requests known.

    Decodes of requests that have ended are left out. Prefill chunks are not: other requests may
    share the blocks they fill.
    """
    rows = [Row.of(sequences[chunk.request], chunk.start, chunk.stop) for chunk in step.prefill]
    for name in step.decode:
        sequence = sequences[name]
        if not sequence.finish:
            rows.append(Row.of(sequence, sequence.known - 1, sequence.known, decode=True))
    return rows
