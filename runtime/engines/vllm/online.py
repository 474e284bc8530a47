"""`OnlineSource`: plans what reaches vLLM by itself, through its own entry points."""

import logging
from typing import Any

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.runtime.backend import EngineView
from sagellm_ir.runtime.engines.vllm.targets import SESSION, option
from sagellm_ir.runtime.planner import OnlinePlanner

__all__ = ["OnlineSource"]

logger = logging.getLogger(__name__)


class OnlineSource:
    """Submits every request that vLLM's scheduler holds to an `OnlinePlanner`, and asks it for steps.

    vLLM's `cache_salt` is the tenant: requests of different salts never share KV.
    """

    def __init__(self, planner: OnlinePlanner, sequences: dict[str, Any]) -> None:
        self.planner = planner
        self._sequences = sequences
        self._known: set[str] = set()
        self._refused: list[str] = []

    @classmethod
    def of(cls, vllm_config: Any, scheduler: Any) -> "OnlineSource":
        """For a scheduler that is being made; `--additional-config '{"sagellm_pipeline": "O3"}'`.

        Raises:
            SageIRError: the pipeline cannot be parsed.
        """
        pipeline = option(vllm_config, "sagellm_pipeline", "O2")
        return cls(OnlinePlanner(scheduler.target, pipeline), scheduler.sequences)

    def next_step(self, view: EngineView) -> PlanStep | None:
        """See `PlanSource`."""
        self._known &= self._sequences.keys()
        for name, sequence in self._sequences.items():
            if name not in self._known:
                self._known.add(name)
                self._submit(name, sequence.request)
        return self.planner.next_step(view)

    def take_refused(self) -> list[str]:
        """Requests that can never be planned, told once."""
        refused, self._refused = self._refused, []
        return refused

    def _submit(self, name: str, request: Any) -> None:
        extra = request.sampling_params.extra_args or {}
        session = extra.get(SESSION)
        try:
            if request.use_structured_output or request.prompt_token_ids is None:
                raise ValueError("grammars and embedded prompts cannot be planned")
            self.planner.submit(
                PlanRequest(
                    name,
                    max_new_tokens=request.max_tokens,
                    arrival=request.arrival_time,
                    priority=-request.priority,
                    adapter=request.lora_request.lora_name if request.lora_request else None,
                    tenant=request.cache_salt,
                    session=None if session is None else str(session),
                    prompt_len=request.num_prompt_tokens,
                    tokens=tuple(request.prompt_token_ids),
                )
            )
        except (SageIRError, ValueError) as error:
            logger.warning("request %s refused: %s", name, error)
            self._refused.append(name)
