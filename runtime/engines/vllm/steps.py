"""`StepForwards`: the steps of a plan as the forwards that vLLM asks for one by one."""

from collections.abc import Callable, Mapping

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import KVMove, PlanStep, PrefixGroup
from sagellm_ir.runtime.engines.vllm.batch import check_rows, shared_by
from sagellm_ir.runtime.engines.vllm.blocks import BlockLedger, to_engine
from sagellm_ir.runtime.engines.vllm.copier import Copy
from sagellm_ir.runtime.engines.vllm.sequences import Row, Sequence, rows_of
from sagellm_ir.target import DEVICE, Target

__all__ = ["StepForwards"]


class StepForwards:
    """What a source's steps say, forward by forward.

    Args:
        ledger: takes what they say of blocks.
        target: what rows must fit.
        sequences: requests by the name that plans use.
        next_step: gives the next step, when the one before is over; None: there is none now.
        share: whether the workers read once what some rows share.
    """

    def __init__(
        self,
        ledger: BlockLedger,
        target: Target,
        sequences: Mapping[str, Sequence],
        next_step: Callable[[], PlanStep | None],
        share: bool,
    ) -> None:
        self._ledger, self._target, self._sequences = ledger, target, sequences
        self._next_step, self._share = next_step, share
        self._step: PlanStep | None = None
        self.left = 0
        """Forwards of the step that are still to run."""
        self.begun = 0
        """Steps that have begun."""
        self.shared: list[PrefixGroup] = []
        """What rows of the last forward share."""
        self.copies: list[Copy] = []
        """Of blocks, before the next forward."""
        self.moves: list[KVMove] = []
        """Those of the steps, until an adapter has reported them."""

    @property
    def groups(self) -> tuple[PrefixGroup, ...]:
        """The step's."""
        return self._step.groups if self._step else ()

    def next_rows(self) -> list[Row]:
        """The rows of the next forward; none: nothing is to run now.

        Raises:
            SageIRError: it cannot run; nothing of it has.
        """
        while True:
            if not self.left:
                self._step = self._next_step()
                if self._step is None:
                    return []
                self._begin(self._step)
            assert self._step is not None
            rows = rows_of(self._step, self._sequences)
            left, self.left = self.left, 0  # a step that cannot run is not tried again
            if rows:
                check_rows(rows, self._ledger, self._target)
                if self._share:
                    self.shared = shared_by(self._step.groups, rows, self._ledger)
                self.left = left - 1
                return rows

    def _begin(self, step: PlanStep) -> None:
        """Note a step's moves, frees and binds."""
        if step.worker != self._ledger.worker:
            raise SageIRError(
                Diagnostic(f"the plan names worker {step.worker!r}; known: {self._ledger.worker}")
            )
        for name in (*(chunk.request for chunk in step.prefill), *step.decode):
            if name not in self._sequences:
                raise SageIRError(
                    Diagnostic(f"the plan names request {name!r}, which was never submitted")
                )
        for item in step.kv:
            if isinstance(item, KVMove):
                self._ledger.move(item)
                src = to_engine(item.src) if item.from_tier == DEVICE else item.src
                dst = to_engine(item.dst) if item.to_tier == DEVICE else item.dst
                self.copies.append(Copy(item.from_tier, item.to_tier, src, dst))
                self.moves.append(item)
            else:
                self._ledger.free(item)
        for bind in step.binds:
            self._ledger.bind(bind)
        self.left = 1 if step.prefill else step.loops
        self.begun += 1
