"""Host time of LMDeploy's scheduling decisions, with and without a plan source."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Ticks"]


class Ticks:
    """Times each decision that gave rows, in milliseconds. It wraps the engine's scheduler for good.

    Of a plan source both calls count: the one for the phase and the one for the step. Of LMDeploy's own
    rules the rule for the phase does not (it reads four counters).
    """

    def __init__(self, engine: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self.times: list[float] = []
        self._clock, self._spent = clock, 0.0
        scheduler = engine.scheduler
        source = getattr(scheduler, "plan_source", None)
        if source is not None:
            source.decide_prefill = self._timed(source.decide_prefill)
        scheduler.schedule = self._timed(scheduler.schedule, ends=True)

    def _timed(self, call: Callable[..., Any], ends: bool = False) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._clock()
            try:
                result = call(*args, **kwargs)
            finally:
                self._spent += self._clock() - began
            if ends and result.running:
                self.times.append(self._spent * 1e3)
                self._spent = 0.0
            return result

        return timed

    def take(self) -> dict[str, float]:
        """Figures of the decisions since the last call."""
        times, self.times = np.array(self.times or [0.0]), []
        return {
            "ticks": len(times),
            "tick_p50_ms": round(float(np.percentile(times, 50)), 3),
            "tick_p99_ms": round(float(np.percentile(times, 99)), 3),
            "tick_max_ms": round(float(times.max()), 3),
            "tick_sum_ms": round(float(times.sum()), 1),
        }
