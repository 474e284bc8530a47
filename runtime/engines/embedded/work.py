"""The rows of one forward."""

from attrs import frozen

from sagellm_ir.lowering.plan import PlanStep
from sagellm_ir.runtime.engines.embedded.sequence import Sequence
from sagellm_ir.runtime.engines.embedded.worker import WorkerMemory

__all__ = ["Work", "ordered"]


@frozen
class Work:
    """A row of one forward: tokens `[start, stop)` of a sequence."""

    sequence: Sequence
    start: int
    stop: int
    decode: bool

    @property
    def yields(self) -> bool:
        """Whether it reaches the last token known, so that its logits give the next one."""
        return self.stop == len(self.sequence.tokens) and not self.sequence.finish


def ordered(step: PlanStep, worker: WorkerMemory, work: list[Work]) -> list[Work]:
    """Chunks first, then decode rows by prefix group and place in memory.

    Neighbours share attention calls, and reading and writing them takes no copy.

    Raises:
        SageIRError: a request's table is too short for its row.
    """
    groups: dict[str, list[int]] = {}
    for number, group in enumerate(step.groups):
        for name in group.requests:
            groups.setdefault(name, []).append(number)

    def place(row: Work) -> tuple[bool, list[int], int]:
        name = row.sequence.request.id
        table = worker.table(name, row.stop)
        if not row.decode:
            return False, [], 0
        return True, groups.get(name, []), table.slot(row.start)

    return sorted(work, key=place)
