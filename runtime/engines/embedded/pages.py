"""One layer's KV in the device tier: what the forward writes to and attention reads from."""

from typing import Protocol

import torch
from torch import Tensor

from sagellm_ir.runtime.kv_runtime.codec import Codec

__all__ = ["CodedPages", "NativePages", "Pages"]


class Pages(Protocol):
    """KV of one layer by slot. Everything given and taken is in the model's own type."""

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store KV at slots; returns it as a later read will give it.

        Args:
            slots: (tokens,)
            key: (tokens, kv_heads, head_dim)
            value: as `key`.
        """
        ...

    def spans(self, slot: int, stride: int, number: int, length: int) -> Tensor:
        """Equally spaced spans of neighbouring slots: (2, number, kv_heads, length, head_dim)."""
        ...

    def take(self, index: Tensor) -> Tensor:
        """The slots of a (number, length) index: (2, number, kv_heads, length, head_dim)."""
        ...


class NativePages:
    """KV in the model's own type: spans are read in place.

    Args:
        values: (2, kv_heads, slots, head_dim)
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Pages`."""
        self.values[0].index_copy_(1, slots, key.transpose(0, 1))
        self.values[1].index_copy_(1, slots, value.transpose(0, 1))
        return key, value

    def spans(self, slot: int, stride: int, number: int, length: int) -> Tensor:
        """See `Pages`."""
        return _spans(self.values, slot, stride, number, length)

    def take(self, index: Tensor) -> Tensor:
        """See `Pages`."""
        return _take(self.values, index)


class CodedPages:
    """KV in another type than the model's, decoded when it is read.

    A token reads the KV of its own forward as it was stored, like all later ones do: so what an
    answer is does not depend on how a plan cuts prompts into chunks.

    Args:
        codec: how elements are stored.
        codes: (2, kv_heads, slots, head_dim), of the codec's type.
        dtype: the model's own type.
        scales: (2, kv_heads, slots, 1) in float32, where the scale of each token and head is kept.
        fixed: (2, kv_heads, 1, 1) in float32, the scales of each head if they were given beforehand.
    """

    def __init__(
        self,
        codec: Codec,
        codes: Tensor,
        dtype: torch.dtype,
        scales: Tensor | None = None,
        fixed: Tensor | None = None,
    ) -> None:
        self._codec = codec
        self._codes = codes
        self._dtype = dtype
        self._scales = scales
        self._fixed = fixed

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Pages`."""
        values = torch.stack((key, value)).transpose(1, 2)
        scales = self._fixed
        if self._scales is not None:
            scales = self._codec.scales(values)
            self._scales.index_copy_(2, slots, scales)
        codes = self._codec.encode(values, scales)
        self._codes.index_copy_(2, slots, codes)
        stored = self._codec.decode(codes, scales, self._dtype).transpose(1, 2)
        return stored[0], stored[1]

    def spans(self, slot: int, stride: int, number: int, length: int) -> Tensor:
        """See `Pages`."""
        codes = _spans(self._codes, slot, stride, number, length)
        scales = None if self._fixed is None else self._fixed[:, None]
        if self._scales is not None:
            scales = _spans(self._scales, slot, stride, number, length)
        return self._codec.decode(codes, scales, self._dtype)

    def take(self, index: Tensor) -> Tensor:
        """See `Pages`."""
        scales = None if self._fixed is None else self._fixed[:, None]
        if self._scales is not None:
            scales = _take(self._scales, index)
        return self._codec.decode(_take(self._codes, index), scales, self._dtype)


def _spans(values: Tensor, slot: int, stride: int, number: int, length: int) -> Tensor:
    """A view of a (2, kv_heads, slots, width) tensor."""
    two, heads, token, one = values.stride()
    shape = (2, number, values.shape[1], length, values.shape[3])
    strides = (two, stride * token, heads, token, one)
    return torch.as_strided(values, shape, strides, values.storage_offset() + slot * token)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """A copy out of a (2, kv_heads, slots, width) tensor."""
    taken = values.index_select(2, index.flatten())
    return taken.view(*values.shape[:2], *index.shape, -1).transpose(1, 2)
