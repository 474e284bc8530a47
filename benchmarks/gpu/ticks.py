"""Host time of LMDeploy's scheduling decisions, with and without a plan source."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Ticks"]


class Ticks:
    """Times each decision that gave rows, in milliseconds. It wraps the engine's scheduler for good.

    What a plan source does between decisions (it compiles then) is timed beside them.

    Of a plan source both calls count: the one for the phase and the one for the step. Of LMDeploy's own
    rules the rule for the phase does not (it reads four counters).
    """

    def __init__(self, engine: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self.times: list[float] = []
        self.blocking: list[float] = []
        """The part of each that was spent while no forward was in flight."""
        self.outside: list[float] = []
        """By decision: what was done between the one before it and this one."""
        self._clock, self._spent, self._alone, self._between = clock, 0.0, 0.0, 0.0
        self._scheduler = scheduler = engine.scheduler
        source = getattr(scheduler, "plan_source", None)
        if source is not None:
            source.decide_prefill = self._timed(source.decide_prefill)
            source.between = self._beside(source.between)
        scheduler.schedule = self._timed(scheduler.schedule, ends=True)

    def _timed(self, call: Callable[..., Any], ends: bool = False) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            alone = not self._scheduler.num_locked()
            began = self._clock()
            try:
                result = call(*args, **kwargs)
            finally:
                spent = self._clock() - began
                self._spent += spent
                self._alone += spent if alone else 0.0
            if ends and result.running:
                self.times.append(self._spent * 1e3)
                self.blocking.append(self._alone * 1e3)
                self.outside.append(self._between * 1e3)
                self._spent = self._alone = self._between = 0.0
            return result

        return timed

    def _beside(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> None:
            began = self._clock()
            call(*args)
            self._between += self._clock() - began

        return timed

    def take(self) -> dict[str, float]:
        """Figures of the decisions since the last call."""
        times, self.times = np.array(self.times or [0.0]), []
        blocking, self.blocking = np.array(self.blocking or [0.0]), []
        outside, self.outside = np.array(self.outside or [0.0]), []
        return {
            "ticks": len(times),
            "tick_p50_ms": round(float(np.percentile(times, 50)), 3),
            "tick_p99_ms": round(float(np.percentile(times, 99)), 3),
            "tick_max_ms": round(float(times.max()), 3),
            "tick_sum_ms": round(float(times.sum()), 1),
            "blocking_p50_ms": round(float(np.percentile(blocking, 50)), 3),
            "blocking_p99_ms": round(float(np.percentile(blocking, 99)), 3),
            "blocking_sum_ms": round(float(blocking.sum()), 1),
            "outside_p99_ms": round(float(np.percentile(outside, 99)), 3),
            "outside_sum_ms": round(float(outside.sum()), 1),
        }
