"""`BareScheduler`: vLLM's scheduler interface where plans have nothing to say."""

from typing import Any

from vllm.v1.core.sched.interface import PauseState, SchedulerInterface

__all__ = ["BareScheduler"]


class BareScheduler(SchedulerInterface):  # type: ignore[misc]  # vLLM has no types
    """What `PlanScheduler` takes over: pausing, and answers about what it leaves out."""

    _paused = PauseState.UNPAUSED

    @property
    def pause_state(self) -> PauseState:
        """Whether vLLM has paused the engine."""
        return self._paused

    def set_pause_state(self, pause_state: PauseState) -> None:
        """vLLM's own; a plan goes on where it was."""
        self._paused = pause_state

    def get_grammar_bitmask(self, scheduler_output: Any) -> None:
        """None: requests with a grammar are refused."""

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """There are none: speculative decoding is refused."""

    def update_draft_token_ids_in_output(self, draft_token_ids: Any, scheduler_output: Any) -> None:
        """There are none."""

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """False: what is cached is the plan's."""
        return False

    def reset_encoder_cache(self) -> None:
        """There is none."""

    def make_stats(self) -> None:
        """None: `stats` has the counters."""

    def shutdown(self) -> None:
        """Nothing to do."""
