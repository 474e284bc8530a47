"""Device time of a piece of work, with a cold L2; and what the device can do at best."""

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["device_rates", "seconds"]

Work = Callable[[], object]
_INSIDE = 10
_REPEATS = 7


def seconds(work: Work) -> tuple[float, str]:
    """Median seconds of one call, and how it was run: `graph` or `eager`.

    A CUDA graph of ten calls is replayed, each after a write that evicts the L2 cache; the time of a
    graph of the writes alone is taken off. Without a GPU: one call, `smoke`, not a measurement.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start, "smoke"
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def flushed() -> None:
        flush.zero_()
        work()

    try:
        cold, alone = _graph(flushed), _graph(flush.zero_)
        samples = [_elapsed(cold) - _elapsed(alone) for _ in range(_REPEATS)]
        return statistics.median(samples) / _INSIDE, "graph"
    except RuntimeError:  # The work cannot be captured.
        torch.cuda.synchronize()
    samples = []
    for _ in range(_INSIDE * _REPEATS):
        flush.zero_()
        samples.append(_elapsed(work))
    return statistics.median(samples), "eager"


def _graph(work: Work) -> Work:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_INSIDE):
            work()
    graph.replay()
    return graph.replay


def _elapsed(work: Work) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def device_rates() -> dict[str, float]:
    """Bytes/s of a large copy (read and write both counted) and FLOP/s of a bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    b, c = torch.randn_like(a), torch.empty_like(a)
    copy, _ = seconds(lambda: target.copy_(source))
    product, _ = seconds(lambda: torch.mm(a, b, out=c))
    return {"bandwidth": 2 * source.nbytes / copy, "flops": 2 * 8192**3 / product}
