"""How an engine is doing: `Metrics` of a request or of all, `Load` of the engine, and their `Meter`."""

import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from statistics import fmean

from attrs import define, evolve, frozen

from sagellm_ir.lowering.plan import KVMove, PlanStep
from sagellm_ir.runtime.backend import EngineStats, EngineView
from sagellm_ir.target import DEVICE, Target

__all__ = ["Load", "Meter", "Metrics", "Timing"]

_RECENT = 256
"""Requests and steps that means and rates look back on."""


@frozen
class Metrics:
    """The figures that SAGE's protocol reports, by its names. Of an engine: means of late requests."""

    ttft_ms: float = 0.0
    """From submission to the first token."""
    tpot_ms: float = 0.0
    """From the first token to the last, for each token after the first."""
    throughput_tps: float = 0.0
    """New tokens a second: of the request since its submission, or of the engine of late."""
    prefill_ms: float = 0.0
    """From the first step to the first token."""
    decode_ms: float = 0.0
    """From the first token to the last."""
    peak_mem_mb: int = 0
    """Most memory that the process has had, MiB."""
    error_rate: float = 0.0
    """Share of the requests that failed."""
    kv_used_tokens: int = 0
    """Tokens whose KV the request held at its end, or running requests hold now, shared ones once.
    What only the cache holds does not count: it gives way."""
    kv_used_bytes: int = 0
    prefix_hit_rate: float = 0.0
    """Share of the prompt tokens that were not computed."""
    evict_count: int = 0
    """Device blocks that gave way: cached ones that were dropped, and those that a plan moved out. Of a
    request: of all requests' blocks, from its first step to its end."""
    evict_ms: float = 0.0
    """Time spent moving blocks, both ways; of a request as `evict_count`."""


@frozen
class Load:
    """What an engine has to do, and what it has done since it started."""

    waiting: int = 0
    """Requests without a step yet."""
    running: int = 0
    kv_used_blocks: int = 0
    """Device blocks that running requests hold; a shared block counts once."""
    kv_held_blocks: int = 0
    """Device blocks that are not free: running requests' and the cache's."""
    kv_capacity_blocks: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    epochs: int = 0
    """Compilations of the online planner."""


@define
class Timing:
    """One request's way through the engine; times by `time.perf_counter`."""

    prompt_tokens: int
    queued: float
    scheduled: float | None = None
    cached: int = 0
    first: float | None = None
    last: float | None = None
    generated: int = 0
    evicted: int = 0
    """What the engine had evicted before the first step."""
    move_seconds: float = 0.0
    """What it had spent on moves before it."""

    def token(self, now: float) -> None:
        """Note one more token."""
        if self.first is None:
            self.first = now
        self.last = now
        self.generated += 1

    def metrics(self, token_bytes: int) -> Metrics:
        """Of this request alone, whose KV takes `token_bytes` a token."""
        if self.scheduled is None or self.first is None or self.last is None:
            return Metrics(peak_mem_mb=_peak_mem_mb())
        decode = self.last - self.first
        tokens = self.prompt_tokens + self.generated - 1
        return Metrics(
            ttft_ms=1e3 * (self.first - self.queued),
            tpot_ms=1e3 * decode / max(1, self.generated - 1),
            throughput_tps=self.generated / max(1e-9, self.last - self.queued),
            prefill_ms=1e3 * (self.first - self.scheduled),
            decode_ms=1e3 * decode,
            peak_mem_mb=_peak_mem_mb(),
            kv_used_tokens=tokens,
            kv_used_bytes=tokens * token_bytes,
            prefix_hit_rate=self.cached / self.prompt_tokens,
        )


class Meter:
    """Counts what an engine does. Written by its worker thread, read by any."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._load = Load(kv_capacity_blocks=_blocks(target))
        self._recent: deque[Metrics] = deque(maxlen=_RECENT)
        self._made: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._spilled = self._dropped = 0
        self._stats = EngineStats()
        self._view = EngineView()

    def began(self, step: PlanStep, epochs: int, dropped: int) -> None:
        """Note a step that has begun; `epochs` and `dropped` blocks are the planner's totals."""
        spilled = sum(
            len(move.src)
            for move in step.kv
            if isinstance(move, KVMove) and move.from_tier == DEVICE != move.to_tier
        )
        with self._lock:
            self._spilled += spilled
            self._dropped = dropped
            self._load = evolve(self._load, epochs=epochs)

    def took(self, tokens: int, stats: EngineStats) -> None:
        """Note a step that has run, and its tokens."""
        with self._lock:
            self._stats = stats
            self._made.append((time.perf_counter(), tokens))
            load = self._load
            self._load = evolve(
                load, steps=load.steps + 1, generated_tokens=load.generated_tokens + tokens
            )

    def started(self, timing: Timing) -> None:
        """Note a request's first step, which has not run yet."""
        with self._lock:
            timing.evicted = self._spilled + self._dropped
            timing.move_seconds = self._stats.move_seconds
            load = self._load
            self._load = evolve(
                load,
                prompt_tokens=load.prompt_tokens + timing.prompt_tokens,
                cached_tokens=load.cached_tokens + timing.cached,
            )

    def ended(self, timing: Timing, outcome: str) -> Metrics:
        """Note a request's end (`finished`, `aborted` or `failed`); its figures."""
        found = timing.metrics(self._target.model.kv_bytes_per_token)
        with self._lock:
            if timing.scheduled is not None:
                found = evolve(
                    found,
                    evict_count=self._spilled + self._dropped - timing.evicted,
                    evict_ms=1e3 * (self._stats.move_seconds - timing.move_seconds),
                )
            self._load = evolve(self._load, **{outcome: getattr(self._load, outcome) + 1})
            if outcome == "finished":
                self._recent.append(found)
        return found

    def look(self, view: EngineView, waiting: int, unfinished: int) -> None:
        """Note the state before a step."""
        with self._lock:
            self._view = view
            self._load = evolve(self._load, waiting=waiting, running=unfinished - waiting)

    def load(self) -> Load:
        """As of the last step."""
        with self._lock:
            load, view = self._load, self._view
        used = _used(view)
        free = [count for (_, tier), count in view.free.items() if tier == DEVICE]
        held = load.kv_capacity_blocks - sum(free) if free else used
        return evolve(load, kv_used_blocks=used, kv_held_blocks=held)

    def metrics(self) -> Metrics:
        """Of the engine: means of the last requests, totals since the start."""
        load = self.load()
        with self._lock:
            recent, made = list(self._recent), list(self._made)
            evicted, stats = self._spilled + self._dropped, self._stats
        seconds = time.perf_counter() - made[0][0] if made else 0.0
        used = load.kv_used_blocks * self._target.block_size
        return Metrics(
            ttft_ms=_mean(m.ttft_ms for m in recent),
            tpot_ms=_mean(m.tpot_ms for m in recent),
            prefill_ms=_mean(m.prefill_ms for m in recent),
            decode_ms=_mean(m.decode_ms for m in recent),
            throughput_tps=sum(count for _, count in made) / seconds if seconds else 0.0,
            peak_mem_mb=_peak_mem_mb(),
            error_rate=load.failed / max(1, load.failed + load.finished + load.aborted),
            kv_used_tokens=used,
            kv_used_bytes=used * self._target.model.kv_bytes_per_token,
            prefix_hit_rate=load.cached_tokens / max(1, load.prompt_tokens),
            evict_count=evicted,
            evict_ms=1e3 * stats.move_seconds,
        )


def _blocks(target: Target) -> int:
    tier = target.tier(DEVICE)
    return tier.blocks * len(target.workers) if tier else 0


def _used(view: EngineView) -> int:
    """Device blocks of running requests: full ones, told apart by place, and one begun each."""
    live = {seen.id for seen in view.running}
    full = {
        (prefix.worker, block)
        for prefix in view.cached
        if prefix.tier == DEVICE and prefix.request in live
        for block in prefix.blocks
    }
    return len(full) + len(live)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else 0.0


def _peak_mem_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)
