"""The paged KV pool: one tensor a tier, and the block tables that point into it."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.engines.embedded.pages import CodedPages, NativePages, Pages
from sagellm_ir.runtime.engines.tiers import check_blocks
from sagellm_ir.runtime.kv_runtime.codec import CODECS, Codec
from sagellm_ir.runtime.protocols import KVCacheSchema, QuantizationProfile
from sagellm_ir.target import DEVICE

__all__ = ["BlockTable", "KVPool", "Span"]

Span = tuple[int, int]
"""First slot and number of tokens that lie side by side in the pool. Slot = block * size + offset."""


class BlockTable:
    """A request's blocks in order, and where they lie side by side."""

    def __init__(self, block_size: int) -> None:
        self.blocks: list[int] = []
        self._size = block_size
        self._runs: list[tuple[int, int]] | None = None

    def bind(self, at: int, blocks: Sequence[int]) -> None:
        """Set the entries from `at` on; `at` must not leave a hole."""
        self.blocks[at : at + len(blocks)] = blocks
        self._runs = None

    @property
    def capacity(self) -> int:
        """Tokens that the table has room for."""
        return len(self.blocks) * self._size

    def slot(self, position: int) -> int:
        """Where the KV of the token at this position lies."""
        return self.blocks[position // self._size] * self._size + position % self._size

    def spans(self, start: int, stop: int) -> list[Span]:
        """Where the KV of tokens `[start, stop)` lies, in order, in as few pieces as possible."""
        if self._runs is None:
            heads = [i for i, (a, b) in enumerate(pairwise(self.blocks), 1) if b != a + 1]
            bounds = [0, *heads, len(self.blocks)]
            self._runs = list(pairwise(bounds))
        found = []
        for first, last in self._runs:
            low = max(start, first * self._size)
            high = min(stop, last * self._size)
            if low < high:
                found.append((self.slot(low), high - low))
        return found


class KVPool:
    """KV memory of one worker, taken once: nothing is allocated while requests run.

    A tier is (layers, 2, kv_heads, blocks, block_size, head_dim), and, where codes have scales,
    the same with one float32 instead of `head_dim` codes. Blocks with neighbouring numbers are
    neighbours in memory for each head, so a run of them is one attention operand without a copy; a
    moved block is `layers * 2 * kv_heads` pieces of `block_size * head_dim` elements.

    Args:
        schema: the model's, with the type elements are stored in.
        tiers: blocks by name.
        dtype: the model's own type.
        device: of the tier `device`; the others lie in host memory.
        profile: where the schema's scales are those of each head, what they are.
    """

    def __init__(
        self,
        schema: KVCacheSchema,
        tiers: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
        profile: QuantizationProfile | None = None,
    ) -> None:
        self.schema = schema
        self.block_size = schema.block_size
        self.capacity = dict(tiers)
        codec = CODECS[schema.dtype]
        parts = [(schema.head_dim, codec.dtype)]
        if schema.scales == "token_head":
            parts.append((1, torch.float32))
        heads = (schema.layers, 2, schema.kv_heads)
        self._tiers = {
            name: [
                _zeros((*heads, blocks, self.block_size, width), kind, device, host=name != DEVICE)
                for width, kind in parts
            ]
            for name, blocks in tiers.items()
        }
        by_layer = zip(*(part.flatten(3, 4).unbind(0) for part in self._tiers[DEVICE]), strict=True)
        fixed = _fixed(profile, device) or [None] * schema.layers
        self.layers: list[Pages] = [
            _pages(codec, dtype, *each) for each in zip(by_layer, fixed, strict=True)
        ]
        """The device tier, layer by layer."""

    def check(self, tier: str, blocks: Sequence[int]) -> None:
        """See `check_blocks`."""
        check_blocks(self.capacity, tier, blocks)

    def copy(
        self, tier: str, src: Sequence[int], to: "KVPool", to_tier: str, dst: Sequence[int]
    ) -> None:
        """Copy blocks, `src[i]` to `dst[i]`, to a tier of this or another worker's pool."""
        self.check(tier, src)
        to.check(to_tier, dst)
        for source, target in zip(self._tiers[tier], to._tiers[to_tier], strict=True):
            _copy_blocks(source, src, target, dst)

    def copy_within(self, tier: str, src: Sequence[int], to_tier: str, dst: Sequence[int]) -> None:
        """See `KVBackendProtocol`."""
        self.copy(tier, src, self, to_tier, dst)

    def read(self, tier: str, blocks: Sequence[int]) -> bytes:
        """See `KVBackendProtocol`."""
        self.check(tier, blocks)
        taken = [
            _bytes(part.index_select(3, torch.tensor(blocks, device=part.device)).movedim(3, 0))
            for part in self._tiers[tier]
        ]
        return torch.cat(taken, 1).numpy().tobytes()

    def write(self, tier: str, blocks: Sequence[int], data: bytes) -> None:
        """See `KVBackendProtocol`."""
        self.check(tier, blocks)
        size = self.schema.block_bytes
        if len(data) != len(blocks) * size:
            message = f"{len(data)} bytes are not {len(blocks)} KV blocks of {size}"
            raise SageIRError(Diagnostic(message))
        rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(len(blocks), size)
        start = 0
        for part in self._tiers[tier]:
            shape = (*part.shape[:3], *part.shape[4:])
            stop = start + math.prod(shape) * part.itemsize
            piece = rows[:, start:stop].contiguous().view(part.dtype).view(len(blocks), *shape)
            index = torch.tensor(blocks, device=part.device)
            part.index_copy_(3, index, piece.movedim(0, 3).to(part.device))
            start = stop


def _bytes(blocks: Tensor) -> Tensor:
    """(blocks, bytes) of a (blocks, ...) tensor, in host memory."""
    return blocks.contiguous().cpu().view(len(blocks), -1).view(torch.uint8)


def _pages(
    codec: Codec, dtype: torch.dtype, parts: tuple[Tensor, ...], fixed: Tensor | None
) -> Pages:
    """One layer of the device tier: its codes, and its scales if it keeps any."""
    codes, *scales = parts
    if codec.dtype == dtype:
        return NativePages(codes)
    return CodedPages(codec, codes, dtype, scales[0] if scales else None, fixed)


def _fixed(profile: QuantizationProfile | None, device: torch.device) -> list[Tensor | None]:
    """By layer, the (2, kv_heads, 1, 1) scales of a profile that gives them; else nothing."""
    if profile is None or profile.scales != "head":
        return []
    both = torch.tensor([profile.key_scales, profile.value_scales], device=device)
    return list(both.transpose(0, 1)[..., None, None])


def _copy_blocks(source: Tensor, src: Sequence[int], target: Tensor, dst: Sequence[int]) -> None:
    if source is not target and _is_run(src) and _is_run(dst):
        piece = source[:, :, :, src[0] : src[-1] + 1]
        target[:, :, :, dst[0] : dst[-1] + 1].copy_(piece, non_blocking=True)
        return
    taken = source.index_select(3, torch.tensor(src, device=source.device))
    index = torch.tensor(dst, device=target.device)
    target.index_copy_(3, index, taken.to(target.device))


def _is_run(blocks: Sequence[int]) -> bool:
    return bool(blocks) and all(b == a + 1 for a, b in pairwise(blocks))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, host: bool) -> Tensor:
    """Zeros: masked attention may read what was never written, which must not be NaN."""
    if device.type != "cpu":
        if host:
            return torch.zeros(shape, dtype=dtype, pin_memory=True)
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy leaves zeroing to the system, page by page at first use; torch would touch it all.
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
