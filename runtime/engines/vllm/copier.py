"""`BlockCopier`: copies KV blocks between and within a worker's tiers, beside its forwards."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, cycle, pairwise
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from sagellm_ir.target import DEVICE

__all__ = ["BlockCopier", "Copy"]

STAGED = 2**27
"""Bytes of a part: so much is copied at a time between tiers."""
PARTS = 2
"""Parts: one is filled while another one is emptied."""


@frozen
class Copy:
    """Copy blocks `src[i]` to `dst[i]`; device blocks in vLLM's numbers."""

    from_tier: str
    to_tier: str
    src: Sequence[int]
    dst: Sequence[int]


@frozen
class _Part:
    """Device memory that blocks go through."""

    staged: Tensor
    """(blocks, bytes of all layers)."""
    layers: tuple[Tensor, ...]
    """The same, each layer in its own type and shape: (blocks, ...)."""
    filled: Any
    """The event that what was read is in it."""
    free: Any
    """The event that it has been written where it belongs."""


class BlockCopier:
    """Copies in the order they are asked for, and nothing here waits for them.

    Blocks between the device and other tiers go through `PARTS` pieces of device memory. Device blocks are
    read and written in the stream of the forwards, so that each forward has what it needs and nothing
    else; what goes over the bus has a stream of its own and runs beside forwards: blocks for the next
    forward come while the one before runs, and the next forward does not wait for those that leave.

    Args:
        layers: KV tensors of (blocks, ...), one a layer, of one device.
        tiers: blocks of the tiers besides the device: memory of the host, pinned beside a GPU, in which
            a block is one piece with all its layers.
    """

    def __init__(self, layers: Sequence[Tensor], tiers: Mapping[str, int]) -> None:
        self._layers = layers
        sizes = [layer[0].numel() * layer.itemsize for layer in layers]
        self._stops = list(accumulate(sizes, initial=0))
        self._device = layers[0].device
        self._pinned = self._device.type != "cpu"
        self._tiers = {
            name: torch.zeros(count, sum(sizes), dtype=torch.uint8, pin_memory=self._pinned)
            for name, count in tiers.items()
        }
        self._streams = torch.get_device_module(self._device)
        self._bus = self._streams.Stream()
        most = max(1, min(STAGED // sum(sizes), *tiers.values(), len(layers[0]))) if tiers else 0
        self._turns = cycle([self._part(most) for _ in range(PARTS)])

    def copy(self, copy: Copy) -> None:
        """Have blocks copied before the next forward; those that leave the device, at some time."""
        if copy.from_tier == copy.to_tier:
            self._shift(copy)
            return
        reader, writer = self._stream(copy.from_tier), self._stream(copy.to_tier)
        at = 0
        while at < len(copy.src):
            part = next(self._turns)
            stop = at + len(part.staged)
            with self._streams.stream(reader):
                part.free.wait(reader)
                self._read(copy.from_tier, copy.src[at:stop], part)
                part.filled.record(reader)
            with self._streams.stream(writer):
                part.filled.wait(writer)
                self._write(copy.to_tier, copy.dst[at:stop], part)
                part.free.record(writer)
            at = stop

    def _shift(self, copy: Copy) -> None:
        """Within a tier what is read may be written, too: all is read first."""
        with self._streams.stream(self._stream(copy.from_tier)):
            part = self._part(len(copy.src))
            self._read(copy.from_tier, copy.src, part)
            self._write(copy.to_tier, copy.dst, part)

    def _stream(self, tier: str) -> Any:
        """Where a tier is read and written."""
        return self._streams.current_stream() if tier == DEVICE else self._bus

    def _part(self, blocks: int) -> _Part:
        size = self._stops[-1]
        staged = torch.empty(blocks, size, dtype=torch.uint8, device=self._device)
        layers = (
            staged[:, start:stop].view(layer.dtype).view(blocks, *layer.shape[1:])
            for layer, (start, stop) in zip(self._layers, pairwise(self._stops), strict=True)
        )
        return _Part(staged, tuple(layers), self._streams.Event(), self._streams.Event())

    def _read(self, tier: str, blocks: Sequence[int], part: _Part) -> None:
        if tier == DEVICE:
            index, count = self._index(blocks), len(blocks)
            for layer, staged in zip(self._layers, part.layers, strict=True):
                torch.index_select(layer, 0, index, out=staged[:count])
        else:
            for at, run in _runs(blocks):
                part.staged[at].copy_(self._tiers[tier][run], non_blocking=True)

    def _write(self, tier: str, blocks: Sequence[int], part: _Part) -> None:
        if tier == DEVICE:
            index, count = self._index(blocks), len(blocks)
            for layer, staged in zip(self._layers, part.layers, strict=True):
                layer.index_copy_(0, index, staged[:count])
        else:
            for at, run in _runs(blocks):
                self._tiers[tier][run].copy_(part.staged[at], non_blocking=True)

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, pin_memory=self._pinned).to(
            self._device, non_blocking=True
        )


def _runs(blocks: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Where blocks lie side by side: their places in the list, and in the tier."""
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield slice(start, at), slice(blocks[start], blocks[at - 1] + 1)
            start = at
