"""`Flight`: the step in flight, and which step may be given to the engine to run right behind it.

The device then goes on without a pause, while the host still waits for tokens of the step in flight:

- a prefill, also with the next chunk of a prompt whose chunk is in flight: what it computes is known;
- a decode of rows that decode in flight: the engine takes their last tokens, which the host has not
  seen, from where the device left them (`follows` of patch 0003). A row that turns out to have ended
  with such a token is computed for nothing, as LMDeploy does for rows that end inside a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lmdeploy.pytorch.messages import MessageStatus

from sagellm_ir.lowering.plan import PlanStep
from sagellm_ir.runtime.engines.lmdeploy.admission import Admission
from sagellm_ir.runtime.engines.lmdeploy.checks import StepChecks

__all__ = ["Flight"]


class Flight:
    """The step that an engine was given last.

    Args:
        engine: LMDeploy's, patched. One of several ranks does not leave tokens where the others find them.
        admission: knows the chunks in flight, and the room.
        checks: of steps.
    """

    def __init__(self, engine: Any, admission: Admission, checks: StepChecks) -> None:
        self._can_follow = engine.dist_config.world_size == 1
        self._admission, self._checks = admission, checks
        self._places: dict[int, int] = {}
        """By sequence: its row in the step, if that decodes."""
        self.decodes = False
        """Whether the step decodes."""

    def took(self, rows: Sequence[Any], is_prefill: bool) -> None:
        """The engine was given a step of these rows."""
        self._places, self.decodes = {}, not is_prefill
        if self._can_follow and self.decodes:
            self._places = {seq.seq_id: at for at, seq in enumerate(rows)}

    def leads_to(self, step: PlanStep, rows: Sequence[Any]) -> bool:
        """Whether a step may run right behind the one in flight.

        Args:
            step: of prefills or of decodes.
            rows: the sequences of its decodes; None for those that are not there.
        """
        if step.prefill:
            return not self._checks.must_wait(step, self._admission.partial)
        if not self._places or not rows or any(seq is None for seq in rows):
            return False
        return all(map(self._decodes_on, rows)) and self._admission.has_room(rows, step.loops + 1)

    def _decodes_on(self, seq: Any) -> bool:
        """Whether a sequence decodes in flight, and the host need not know its last token.

        LMDeploy decides for a whole step whether an answer may end; and what some models say of a
        sequence (`model_meta`) comes with its tokens.
        """
        in_flight = seq.seq_id in self._places and seq.status is MessageStatus.LOCKED
        may_end = seq.num_new_tokens + 1 == seq.sampling_param.min_new_tokens
        return in_flight and not may_end and seq.model_meta is None

    def pending(self, rows: Sequence[Any]) -> int:
        """Tokens of each row of a decode that the step in flight is still to give."""
        return int(rows[0].status is MessageStatus.LOCKED)

    def places(self, rows: Sequence[Any]) -> torch.Tensor:
        """For each row of a decode behind the one in flight its row there: int64 `[rows]`."""
        return torch.tensor([self._places[seq.seq_id] for seq in rows])
