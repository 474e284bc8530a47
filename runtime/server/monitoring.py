"""`Monitor`: what /metrics tells Prometheus."""

from collections.abc import Iterator

from attrs import fields
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sagellm_ir.runtime.engines.answers import Response
from sagellm_ir.runtime.engines.metrics import Load, Metrics
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine

__all__ = ["Monitor"]

_GAUGES = {
    "waiting": "Requests without a step yet",
    "running": "Requests under way",
    "kv_used_blocks": "Device blocks that running requests hold, shared ones once",
    "kv_held_blocks": "Device blocks of running requests and of the cache",
    "kv_capacity_blocks": "Device blocks",
}
_COUNTERS = {
    "finished": "Requests that got their answer",
    "aborted": "Requests that their clients left",
    "failed": "Requests that the engine refused or lost",
    "prompt_tokens": "Prompt tokens of started requests",
    "cached_tokens": "Prompt tokens that were not computed",
    "generated_tokens": "New tokens",
    "steps": "Steps that were run",
    "epochs": "Compilations of the online planner",
}
_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
assert {*_GAUGES, *_COUNTERS} == {field.name for field in fields(Load)}


class _EngineCollector(Collector):
    """Reads the engine when Prometheus asks."""

    def __init__(self, engine: SageLLMEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        load, metrics = self._engine.load(), self._engine.metrics()
        for name, help_ in _GAUGES.items():
            yield GaugeMetricFamily(f"sagellm_{name}", help_, getattr(load, name))
        for name, help_ in _COUNTERS.items():
            yield CounterMetricFamily(f"sagellm_{name}", help_, getattr(load, name))
        evicted = "Device blocks that gave way: cached ones dropped, others moved out"
        yield CounterMetricFamily("sagellm_evicted_blocks", evicted, metrics.evict_count)
        yield GaugeMetricFamily(
            "sagellm_throughput_tokens_per_second", "Of late", metrics.throughput_tps
        )


class Monitor:
    """Counts what the server answers, and reads the engine's figures."""

    def __init__(self, engine: SageLLMEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._answers = Counter(
            "sagellm_http_answers", "HTTP answers", ["status"], registry=self._registry
        )
        self._ttft = Histogram(
            "sagellm_ttft_seconds",
            "From submission to the first token",
            buckets=_TTFT,
            registry=self._registry,
        )
        self._tpot = Histogram(
            "sagellm_tpot_seconds",
            "Between two tokens of an answer, its mean",
            buckets=_TPOT,
            registry=self._registry,
        )

    def answered(self, status: int) -> None:
        """Count an HTTP answer."""
        self._answers.labels(str(status)).inc()

    def finished(self, response: Response) -> None:
        """Note the times of an answer."""
        figures: Metrics = response.metrics
        if response.tokens:
            self._ttft.observe(figures.ttft_ms / 1e3)
        if len(response.tokens) > 1:
            self._tpot.observe(figures.tpot_ms / 1e3)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
