"""Static device buffers: the host writes them when the batch changes, kernels read them."""

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Mirror"]


class Mirror:
    """Named int32 arrays in one device tensor, filled from one host tensor by one copy.

    Addresses never change, so a CUDA graph may read them. The copy is asynchronous from pinned
    memory; a write waits until the copy before it has left.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._bounds: dict[str, tuple[int, int]] = {}
        at = 0
        for name, size in sizes.items():
            self._bounds[name] = (at, at + size)
            at += -(-size // 4) * 4
        self._host = torch.zeros(at, dtype=torch.int32, pin_memory=cuda)
        array: NDArray[np.int32] = self._host.numpy()
        self._views = {name: array[start:stop] for name, (start, stop) in self._bounds.items()}
        self._device = torch.zeros(at, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def device(self, name: str) -> torch.Tensor:
        """The array on the device."""
        start, stop = self._bounds[name]
        return self._device[start:stop]

    def wait(self) -> None:
        """Wait for the copy under way: call before the first `write` of a batch."""
        if self._copied is not None:
            self._copied.synchronize()

    def write(self, name: str, values: NDArray[np.int32]) -> None:
        """Set the first `len(values)` elements on the host."""
        view = self._views[name]
        assert len(values) <= len(view), name
        view[: len(values)] = values

    def upload(self, name: str, size: int | None = None) -> None:
        """Copy all arrays up to `name`, of it `size` elements, to the device, on this stream."""
        start, stop = self._bounds[name]
        stop = stop if size is None else start + size
        self._device[:stop].copy_(self._host[:stop], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
