"""Streams on a CPU that run as late and in such an order as a device's may.

What copies tensors inside of a stream is only noted, and run by `Device.run`, which takes the streams'
work in random order, as far as the events that they wait for have come.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Device"]

aten = torch.ops.aten
_NOTED = {
    aten.copy_.default,
    aten.fill_.Scalar,
    aten.index_copy_.default,
    aten.index_select.out,
}


class _Stream:
    def __init__(self) -> None:
        self.work: deque[Callable[[], bool]] = deque()
        """Each says whether it could be done."""


class _Event:
    def __init__(self) -> None:
        self.recorded, self.come = 0, 0

    def record(self, stream: _Stream) -> None:
        self.recorded += 1
        number = self.recorded

        def come() -> bool:
            self.come = max(self.come, number)
            return True

        stream.work.append(come)

    def wait(self, stream: _Stream) -> None:
        number = self.recorded  # as CUDA does: for what was recorded last, not for what will be
        stream.work.append(lambda: self.come >= number)


class _Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    def __init__(self, stream: _Stream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _NOTED:
            return func(*args, **(kwargs or {}))

        def run() -> bool:
            func(*args, **(kwargs or {}))
            return True

        self.stream.work.append(run)
        return (kwargs or {}).get("out", args[0])


class Device:
    """Stands in for `torch.get_device_module(device)`."""

    def __init__(self) -> None:
        self.streams: list[_Stream] = []
        self._current = self.Stream()

    def Stream(self) -> _Stream:
        self.streams.append(_Stream())
        return self.streams[-1]

    Event = _Event

    def current_stream(self) -> _Stream:
        return self._current

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            with _Noting(stream):
                yield
        finally:
            self._current = before

    def run(self, rng: random.Random) -> None:
        """Do all that was noted."""
        while left := [stream for stream in self.streams if stream.work]:
            rng.shuffle(left)
            for stream in left:
                done = 0
                while stream.work and done < rng.randrange(1, 9) and stream.work[0]():
                    stream.work.popleft()
                    done += 1
                if done:
                    break
            else:
                raise AssertionError("streams wait for each other")
