"""`Codec`: KV elements in another type than the model's, with scales where that has few bits."""

import torch
from attrs import frozen
from torch import Tensor

__all__ = ["CODECS", "Codec"]

_SMALLEST = torch.finfo(torch.float32).tiny
"""A scale of zero would divide zero by zero."""


@frozen
class Codec:
    """How elements are stored: `value = code * scale`."""

    dtype: torch.dtype
    """Of the codes in memory. Eight-bit floats lie there as bytes: torch moves no float8."""
    largest: float = 0.0
    """The largest code; 0: codes are the values, and there are no scales."""
    float8: torch.dtype | None = None
    """What the bytes are, if they are eight-bit floats."""

    @property
    def scaled(self) -> bool:
        """Whether codes have scales."""
        return self.largest > 0

    def scales(self, values: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
        """The float32 scales with which the largest value along `dims` is the largest code."""
        largest = values.float().abs().amax(dims, keepdim=True)
        return (largest / self.largest).clamp_(min=_SMALLEST)

    def encode(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """The codes of values. What a scale given beforehand does not reach is clamped.

        Args:
            scales: of any shape that broadcasts; None for codecs without them.
        """
        if scales is None:
            return values.to(self.dtype)
        # Division may round up beyond the largest finite code, which e4m3 turns into NaN.
        codes = (values / scales).clamp_(-self.largest, self.largest)
        if self.float8 is not None:
            return codes.to(self.float8).view(self.dtype)
        return codes.round_().to(self.dtype)

    def decode(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The values of codes, in `dtype`."""
        if scales is None:
            return codes.to(dtype)
        wide, exponent = codes, 0
        if self.float8 is not None and codes.device.type == "cpu":
            wide, exponent = _halves(codes, self.float8)
        elif self.float8 is not None:
            wide = codes.view(self.float8)
        if exponent:
            scales = scales * 2.0**exponent
        return wide.float().mul_(scales).to(dtype)


def _halves(codes: Tensor, float8: torch.dtype) -> tuple[Tensor, int]:
    """Bytes of eight-bit floats as float16, and the power of two that is missing in them.

    torch converts e4m3 on a CPU one by one (measured: 3 ns an element, this 0.3). Both formats are
    float16 with fewer bits: e5m2 is its upper byte; e4m3 has one bit less of exponent, so that its
    bits put in place read as the value over 2**8. Subnormal numbers come out right, too.
    """
    wide = codes.view(torch.int8).to(torch.int16)
    if float8 == torch.float8_e5m2:
        return (wide << 8).view(torch.float16), 0
    return wide.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16), 8


CODECS: dict[str, Codec] = {
    "fp32": Codec(torch.float32),
    "bf16": Codec(torch.bfloat16),
    "fp16": Codec(torch.float16),
    "fp8_e4m3": Codec(torch.uint8, 448.0, torch.float8_e4m3fn),
    "fp8_e5m2": Codec(torch.uint8, 57344.0, torch.float8_e5m2),
    "int8": Codec(torch.int8, 127.0),
}
"""By the name of `KVCacheSchema.dtype`."""
