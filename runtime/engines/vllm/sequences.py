"""One request inside `PlanScheduler`, and the rows of a forward."""

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
    computed: int = 0
    sent: list[int] | None = None
    """The block table that the workers have, in vLLM's numbers; None: they do not know it yet."""
    finish: Finish | None = None

    @property
    def known(self) -> int:
        """Tokens of its prompt and its answer so far."""
        return int(self.request.num_tokens)

    def view(self) -> RequestView:
        """For the planner."""
        request = self.request
        return RequestView(
            self.name,
            request.num_prompt_tokens,
            self.computed,
            request.num_output_tokens,
            request.max_tokens,
            self.finish,
        )


@frozen
class Row:
    """Tokens `[start, stop)` of a sequence in one forward."""

    sequence: Sequence
    start: int
    stop: int
    decode: bool


def rows_of(step: PlanStep, sequences: "dict[str, Sequence]") -> list[Row]:
    """The rows of the next forward of a step, all of its requests known.

    Decodes of requests that have ended are left out. Prefill chunks are not: other requests may
    share the blocks they fill.
    """
    rows = [Row(sequences[chunk.request], chunk.start, chunk.stop, False) for chunk in step.prefill]
    for name in step.decode:
        sequence = sequences[name]
        if not sequence.finish:
            rows.append(Row(sequence, sequence.known - 1, sequence.known, True))
    return rows
