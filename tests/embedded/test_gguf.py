"""GGUF files: every type's values, and no broken file gives anything but one clear error."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.engines.embedded.gguf import GGUFFile


def text(value: str) -> bytes:
    """A string as the format writes it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(tensors: dict[str, tuple[int, tuple[int, ...], bytes]], version: int = 3) -> bytes:
    """A file with some metadata of every kind, and tensors as (type, shape, bytes)."""
    pairs = [
        text("name") + struct.pack("<I", 8) + text("tiny"),
        text("count") + struct.pack("<II", 4, 7),
        text("yes") + struct.pack("<I?", 7, True),
        text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("floats") + struct.pack("<IIQff", 9, 6, 2, 0.5, -1.5),
    ]
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        dims = tuple(reversed(shape))
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def half(value: float) -> bytes:
    """A float16."""
    return np.float16(value).tobytes()


NIBBLES = bytes(i | (15 - i) << 4 for i in range(16))
LOW, HIGH = np.arange(16), np.arange(15, -1, -1)
CASES = {
    "F32": (0, np.arange(32, dtype="<f4").tobytes(), np.arange(32)),
    "F16": (1, np.arange(32).astype("<f2").tobytes(), np.arange(32)),
    "Q4_0": (2, half(0.5) + NIBBLES, (np.concatenate([LOW, HIGH]) - 8) * 0.5),
    "Q4_1": (3, half(0.5) + half(-2) + NIBBLES, np.concatenate([LOW, HIGH]) * 0.5 - 2),
    "Q8_0": (8, half(0.25) + bytes(range(240, 256)) + bytes(16), None),
    "BF16": (30, struct.pack("<32H", *[0x3FC0] * 32), np.full(32, 1.5)),
}


def read(tmp_path: Path, data: bytes) -> GGUFFile:
    """Write and open a file."""
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("version", [2, 3])
def test_values(tmp_path: Path, name: str, version: int) -> None:
    kind, raw, expected = CASES[name]
    if expected is None:
        expected = np.concatenate([np.arange(-16, 0) * 0.25, np.zeros(16)])
    other = (0, (2,), struct.pack("<ff", 1, 2))
    file = read(tmp_path, gguf({"other": other, "t": (kind, (1, 32), raw)}, version))
    assert file.tensor("t").dtype == np.float32
    np.testing.assert_array_equal(file.tensor("t"), expected.reshape(1, 32).astype(np.float32))
    np.testing.assert_array_equal(file.tensor("other"), [1, 2])
    assert file.metadata == {
        "name": "tiny",
        "count": 7,
        "yes": True,
        "words": ["a", "b"],
        "floats": [0.5, -1.5],
    }


GOOD = gguf({"t": (2, (1, 32), CASES["Q4_0"][1])})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot read"),
        (b"GGML" + GOOD[4:], "does not start with 'GGUF'"),
        (gguf({}, version=1), "version 1"),
        (gguf({"t": (99, (32,), b"")}), "ggml type 99; read here: F32"),
        (gguf({"t": (2, (3,), bytes(32))}), "no whole number of blocks"),
        (gguf({"t": (0, (1, 1, 1, 1, 1), bytes(32))}), "5 dimensions"),
        (gguf({"t": (0, (2**40,), bytes(32))}), "after the end of the file"),
        (GOOD[:24] + struct.pack("<Q", 2**62) + GOOD[32:], "cut short"),
    ],
)
def test_broken_files(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(SageIRError, match=message):
        read(tmp_path, data)


def test_every_cut_is_seen(tmp_path: Path) -> None:
    used = len(GOOD) - 14  # behind these are only the last tensor's padding bytes
    for size in range(used):
        with pytest.raises(SageIRError):
            read(tmp_path, GOOD[:size])


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255))
@example(at=174, value=17)  # a tensor without dimensions, of a type that has blocks
def test_a_changed_byte_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    data = bytearray(GOOD)
    data[at] = value
    try:
        file = read(tmp_path_factory.mktemp("gguf"), bytes(data))
    except SageIRError:
        return
    for name in file.tensors:
        assert file.tensor(name).dtype == np.float32
