"""Counts LMDeploy's collectives: calls, bytes and time, those inside CUDA graphs at every replay.

Needs patch 0004. A collective that is captured into a CUDA graph calls Python once, at capture, and
runs at each replay; so what a capture recorded is added each time its graph is replayed.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import define, field
from lmdeploy.pytorch import comm

__all__ = ["CollectiveCount", "CollectiveCounter"]


@define
class CollectiveCount:
    """One kind of collective, since counting began."""

    calls: int = 0
    bytes: int = 0
    """What this rank put in."""
    replayed: int = 0
    """Calls of these that CUDA graphs made."""
    seconds: float = 0.0
    """Time of the calls outside graphs: of the device for CUDA tensors, else of the caller."""
    _pending: list[tuple[Any, Any]] = field(factory=list, alias="pending", repr=False, eq=False)


class CollectiveCounter:
    """Counts from `start` to `stop`, in one process. `inner` may replace how a collective is run."""

    def __init__(self, inner: Callable[..., Any] | None = None) -> None:
        self._inner = inner
        self._counts: dict[str, CollectiveCount] = {}
        self._capturing: Counter[tuple[str, int]] | None = None
        self._graphs: dict[int, Counter[tuple[str, int]]] = {}

    def start(self) -> None:
        """Count from here on. Before graphs are captured: those captured earlier are not known."""
        comm.intercept(self._call)
        comm.on_graph = self._on_graph

    def stop(self) -> None:
        """Let the engine call torch.distributed directly again."""
        comm.intercept(None)
        comm.on_graph = None

    def counts(self) -> Mapping[str, CollectiveCount]:
        """By name of the collective. Waits for the device when it still runs some."""
        for count in self._counts.values():
            for begin, end in count._pending:
                end.synchronize()
                count.seconds += begin.elapsed_time(end) / 1e3
            count._pending.clear()
        return self._counts

    def _call(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        payload = _payload_of(name, args, kwargs)
        size = sum(tensor.numel() * tensor.element_size() for tensor in payload)
        if self._capturing is not None:
            self._capturing[name, size] += 1
            return self._run(name, call, args, kwargs)
        count = self._count(name)
        count.calls += 1
        count.bytes += size
        if payload[0].is_cuda:
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            result = self._run(name, call, args, kwargs)
            end.record()
            count._pending.append((begin, end))
            return result
        began = time.perf_counter()
        result = self._run(name, call, args, kwargs)
        count.seconds += time.perf_counter() - began
        return result

    def _run(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._inner is None:
            return call(*args, **kwargs)
        return self._inner(name, call, args, kwargs)

    def _on_graph(self, event: str, runner: Any) -> None:
        if event == "capture":
            self._capturing = Counter()
        elif event == "captured" and self._capturing is not None:
            self._graphs[id(runner)] = self._capturing
            self._capturing = None
        elif event == "replayed":
            for (name, size), calls in self._graphs.get(id(runner), Counter()).items():
                count = self._count(name)
                count.calls += calls
                count.replayed += calls
                count.bytes += calls * size

    def _count(self, name: str) -> CollectiveCount:
        return self._counts.setdefault(name, CollectiveCount())


def _payload_of(name: str, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """What this rank puts in: the tensor of an all-reduce or broadcast, else the second argument."""
    if name in ("all_reduce", "broadcast"):
        data = args[0] if args else kwargs["tensor"]
    else:
        names = ("tensor", "input_tensor", "input", "input_list")
        data = args[1] if len(args) > 1 else next(kwargs[key] for key in names if key in kwargs)
    return list(data) if isinstance(data, (list, tuple)) else [data]
