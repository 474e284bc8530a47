"""Device time of a piece of work, with a cold L2; and what the device can do at best."""

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["Timer", "device_rates"]

Work = Callable[[], object]
_LONGEST = 3e-3
"""Seconds that one replay of a graph may take."""
_REPEATS = 9
_MOST = 10
"""Calls in a graph."""


class Timer:
    """Times work on the current device, each call after a read of 256 MB that evicts the L2.

    A read, since lines that a write leaves dirty would be written back during the work. What is
    reported is what the work adds to a CUDA graph: of a graph of reads and works, less one of reads
    and empty kernels, plus an empty kernel.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available():
            self._big = torch.ones(64 << 20, device="cuda")
            one = self._one = torch.ones(1, device="cuda")

            def empty() -> None:
                self._flush()
                one.zero_()

            self._reads, empties = _graph(empty, _MOST), _graph(one.zero_, 100)
            begun = time.monotonic()
            while time.monotonic() - begun < 1.5:  # Clocks rise.
                _elapsed(self._reads)
            self._empty = statistics.median(_elapsed(empties) for _ in range(21)) / 100

    def _flush(self) -> None:
        self._big.sum()

    def seconds(self, work: Work) -> tuple[float, str]:
        """Median seconds of one call, and how it was run: `graph` or `eager`.

        A CUDA graph of up to ten calls is replayed. Without a GPU: one call, `smoke`, not a
        measurement.
        """
        if not torch.cuda.is_available():
            start = time.perf_counter()
            work()
            return time.perf_counter() - start, "smoke"
        work()
        torch.cuda.synchronize()
        once = _elapsed(work)
        inside = max(1, min(_MOST, int(_LONGEST / once)))

        def flushed() -> None:
            self._flush()
            work()

        try:
            replay = _graph(flushed, inside)
            samples = []
            for _ in range(_REPEATS):  # In turns: clocks drift.
                cold = _elapsed(self._reads) / _MOST
                samples.append(_elapsed(replay) / inside - cold + self._empty)
            return statistics.median(samples), "graph"
        except RuntimeError:  # The work cannot be captured.
            torch.cuda.synchronize()
        samples = []
        for _ in range(_REPEATS * inside):
            self._flush()
            samples.append(_elapsed(work))
        return statistics.median(samples), "eager"


def _graph(work: Work, inside: int) -> Work:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inside):
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


def device_rates(timer: Timer) -> dict[str, float]:
    """Bytes/s of a large copy (read and write both counted) and of a large read, and FLOP/s of a
    bf16 product."""
    source = torch.ones(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    b, c = torch.randn_like(a), torch.empty_like(a)
    copy, _ = timer.seconds(lambda: target.copy_(source))
    floats = source.view(torch.float32)
    read, _ = timer.seconds(lambda: floats.sum())
    product, _ = timer.seconds(lambda: torch.mm(a, b, out=c))
    return {
        "bandwidth": 2 * source.nbytes / copy,
        "read": source.nbytes / read,
        "flops": 2 * 8192**3 / product,
    }
