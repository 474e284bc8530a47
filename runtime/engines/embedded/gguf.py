"""Reads GGUF files (format versions 2 and 3) with numpy: metadata, and tensors as float32.

Follows https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length in the file is
checked against the file's size before it is used.
"""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from attrs import frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.nodes.base import Location

__all__ = ["GGUFFile", "TensorInfo"]

Array = npt.NDArray[np.float32]

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMS = 4


@frozen
class TensorInfo:
    """Where a tensor lies in the file and how it is stored. `shape` is rows first, as in torch."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for dim in self.shape:
            size *= dim
        return size


def _f32(raw: npt.NDArray[np.uint8]) -> Array:
    return raw.reshape(-1).view("<f4").astype(np.float32)


def _f16(raw: npt.NDArray[np.uint8]) -> Array:
    return raw.reshape(-1).view("<f2").astype(np.float32)


def _bf16(raw: npt.NDArray[np.uint8]) -> Array:
    return (raw.reshape(-1).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _half(raw: npt.NDArray[np.uint8]) -> Array:
    """One float16 per block, as a column."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: npt.NDArray[np.uint8]) -> Array:
    """16 bytes a block to 32 values: all low halves, then all high halves."""
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float32)


def _q4_0(raw: npt.NDArray[np.uint8]) -> Array:
    return (_nibbles(raw[:, 2:]) - 8) * _half(raw[:, :2])


def _q4_1(raw: npt.NDArray[np.uint8]) -> Array:
    return _nibbles(raw[:, 4:]) * _half(raw[:, :2]) + _half(raw[:, 2:4])


def _q8_0(raw: npt.NDArray[np.uint8]) -> Array:
    return raw[:, 2:].view(np.int8).astype(np.float32) * _half(raw[:, :2])


_TYPES: dict[int, tuple[str, int, int, Callable[[npt.NDArray[np.uint8]], Array]]] = {
    0: ("F32", 1, 4, _f32),
    1: ("F16", 1, 2, _f16),
    2: ("Q4_0", 32, 18, _q4_0),
    3: ("Q4_1", 32, 20, _q4_1),
    8: ("Q8_0", 32, 34, _q8_0),
    30: ("BF16", 1, 2, _bf16),
}
"""By ggml type number: name, elements of a block, bytes of a block, how to make floats of it."""


class GGUFFile:
    """An open GGUF file.

    Raises:
        SageIRError: not a GGUF file, cut short, or a version or tensor type that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
            raise SageIRError(
                Diagnostic(f"cannot read the GGUF file: {error}", Location(str(path), 1))
            ) from None
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_header()

    def tensor(self, name: str) -> Array:
        """The values of a tensor as float32, in a new array of its shape."""
        info = self.tensors[name]
        _, per_block, block_bytes, convert = _TYPES[info.type]
        count = info.size // per_block * block_bytes
        raw = np.frombuffer(self._data, np.uint8, count, info.offset)
        return convert(raw.reshape(-1, block_bytes)).reshape(info.shape)

    def _read_header(self) -> None:
        if self._take(4) != b"GGUF":
            self._fail("it does not start with 'GGUF'")
        version = self._number("<I")
        if version not in (2, 3):
            self._fail(f"format version {version} is not read here, only 2 and 3")
        tensors, keys = self._count(24), self._count(12)
        for _ in range(keys):
            key = self._string()
            self.metadata[key] = self._value(self._number("<I"))
        infos = [self._tensor_info() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            self._fail(f"general.alignment is {alignment!r}, expected a positive number")
        base = -(-self._at // alignment) * alignment
        for info in infos:
            self._place(info, base)

    def _tensor_info(self) -> TensorInfo:
        name = self._string()
        dims = self._number("<I")
        if dims > _MAX_DIMS:
            self._fail(f"tensor {name!r} has {dims} dimensions, expected at most {_MAX_DIMS}")
        shape = tuple(reversed([self._number("<Q") for _ in range(dims)]))
        return TensorInfo(name, shape, self._number("<I"), self._number("<Q"))

    def _place(self, info: TensorInfo, base: int) -> None:
        """Check a tensor's type and that it lies in the file, and keep it."""
        if info.type not in _TYPES:
            known = ", ".join(name for name, *_ in _TYPES.values())
            self._fail(f"tensor {info.name!r} is of ggml type {info.type}; read here: {known}")
        _, per_block, block_bytes, _ = _TYPES[info.type]
        row = info.shape[-1] if info.shape else 1
        if row % per_block:
            self._fail(f"a row of tensor {info.name!r} is no whole number of blocks")
        end = base + info.offset + info.size // per_block * block_bytes
        if end > len(self._data):
            self._fail(f"tensor {info.name!r} ends at byte {end}, after the end of the file")
        self.tensors[info.name] = TensorInfo(info.name, info.shape, info.type, base + info.offset)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item = self._number("<I")
            if item == _STRING:
                return [self._string() for _ in range(self._count(8))]
            dtype = np.dtype(self._scalar(item))
            return np.frombuffer(
                self._take(self._count(dtype.itemsize) * dtype.itemsize), dtype
            ).tolist()
        dtype = np.dtype(self._scalar(kind))
        value = np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
        return bool(value) if kind == _BOOL else value

    def _scalar(self, kind: int) -> str:
        return _SCALARS.get(kind) or self._fail(f"metadata value type {kind} is not read here")

    def _string(self) -> str:
        raw = self._take(self._count(1))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return self._fail("a string in it is not UTF-8")

    def _count(self, item_bytes: int) -> int:
        """A number of things that take at least `item_bytes` each in the rest of the file."""
        count = self._number("<Q")
        if count * item_bytes > len(self._data) - self._at:
            self._fail(f"it is cut short: {count} items expected at byte {self._at}")
        return count

    def _number(self, form: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            self._fail(f"it is cut short: {count} bytes expected at byte {self._at}")
        self._at += count
        return self._data[self._at - count : self._at]

    def _fail(self, what: str) -> NoReturn:
        raise SageIRError(
            Diagnostic(
                f"cannot read the GGUF file: {what}",
                Location(str(self.path), 1),
                help="download the file again, or convert the model to a safetensors folder",
            )
        )
