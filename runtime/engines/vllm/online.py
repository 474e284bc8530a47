"""`OnlineSource`: plans what reaches vLLM by itself, through its own entry points."""

import logging
from collections.abc import Mapping
from typing import Any

from attrs import evolve

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.runtime.backend import EngineView
from sagellm_ir.runtime.engines.vllm.sequences import Sequence
from sagellm_ir.runtime.engines.vllm.targets import SESSION, option
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.target import Target

__all__ = ["OnlineSource"]

logger = logging.getLogger(__name__)


class OnlineSource:
    """An `OnlinePlanner` that the scheduler tells what comes and what ends.

    vLLM's `cache_salt` is the tenant: requests of different salts never share KV.
    """

    def __init__(self, planner: OnlinePlanner, sequences: Mapping[str, Sequence]) -> None:
        self.planner = planner
        self._sequences = sequences
        self._refused: list[str] = []

    @classmethod
    def of(
        cls, vllm_config: Any, target: Target, sequences: Mapping[str, Sequence]
    ) -> "OnlineSource":
        """For a scheduler that is being made; `--additional-config '{"sagellm_pipeline": "O3"}'`.

        It plans one forward at a time, so that what comes does not wait for a step of several.

        Raises:
            SageIRError: the pipeline cannot be parsed.
        """
        pipeline = option(vllm_config, "sagellm_pipeline", "O2")
        planner = OnlinePlanner(evolve(target, max_loops=1), pipeline, spill=True)
        return cls(planner, sequences)

    def next_step(self, view: EngineView) -> PlanStep | None:
        """See `PlanSource`. It knows what the view says."""
        return self.planner.advance(self._answered)

    def come(self, sequence: Sequence) -> None:
        """A request has come."""
        name, request = sequence.name, sequence.request
        extra = request.sampling_params.extra_args or {}
        session = extra.get(SESSION)
        try:
            if request.use_structured_output or request.prompt_token_ids is None:
                raise ValueError("grammars and embedded prompts cannot be planned")
            planned = PlanRequest(
                name,
                max_new_tokens=sequence.most,
                arrival=request.arrival_time,
                priority=-request.priority,
                adapter=request.lora_request.lora_name if request.lora_request else None,
                tenant=request.cache_salt,
                session=None if session is None else str(session),
                prompt_len=request.num_prompt_tokens,
            )
            self.planner.submit(planned, request.prompt_token_ids)
            self.planner.meet(name)
        except (SageIRError, ValueError) as error:
            logger.warning("request %s refused: %s", name, error)
            self._refused.append(name)

    def gone(self, sequence: Sequence) -> None:
        """A request has ended. A forward of it may be in flight, and runs before any that is to come."""
        self.planner.end(sequence.name, tuple(sequence.request.all_token_ids))

    def take_refused(self) -> list[str]:
        """Requests that can never be planned, told once."""
        refused, self._refused = self._refused, []
        return refused

    def _answered(self, name: str) -> int | None:
        """Tokens of an answer; None when a forward in flight brings the last one."""
        sequence = self._sequences[name]
        ends = sequence.pending and sequence.answered >= sequence.most
        return None if ends else sequence.answered
