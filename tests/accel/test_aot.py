"""The kernels, built for an H100/H200 without one: registers, shared memory, no spills.

The limits are what `tiles` promises the planner: so many programs at once on an SM.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sagellm_ir.runtime.accel.spec import AttentionSpec
from sagellm_ir.runtime.accel.tiles import tile_for

SM_REGISTERS = 65536
SM_SHARED = 228 << 10
CTA_SHARED = 1 << 10  # taken by the system for each program

Case = tuple[str, dict[str, Any], int, bool]
"""Kernel, spec, rows of a tile (merge: of the batch), whether it is the shared one."""

LLAMA: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 64}
QWEN = {"heads": 28, "kv_heads": 4, "head_dim": 128, "block_size": 32, "dtype": "float16"}
SMALL_PAGES = LLAMA | {"block_size": 16}
NARROW = LLAMA | {"head_dim": 64, "block_size": 16}
WIDE = LLAMA | {"head_dim": 256}
INT8 = LLAMA | {"kv": "int8"}
FP8 = LLAMA | {"kv": "fp8", "block_size": 16}
EXTRAS = LLAMA | {"window": 4096, "softcap": 30.0, "sinks": True}
ODD = LLAMA | {"head_dim": 80}

# `aot_build.py --all` builds the whole grid; here every tile and every feature once or twice.
CASES: list[Case] = [
    *(("attend", LLAMA, rows, shared) for rows in (16, 32, 64, 128) for shared in (True, False)),
    ("attend", LLAMA | {"heads": 8, "kv_heads": 1}, 16, False),
    *(("attend", QWEN, rows, rows == 64) for rows in (32, 64)),
    *(("attend", SMALL_PAGES, rows, rows == 128) for rows in (16, 128)),
    *(("attend", NARROW, rows, rows == 64) for rows in (16, 64)),
    ("attend", NARROW | {"block_size": 64}, 128, False),
    ("attend", LLAMA | {"hopper": False}, 128, True),
    *(("attend", INT8, rows, rows == 64) for rows in (16, 64)),
    ("attend", FP8, 16, False),
    *(("attend", EXTRAS, rows, rows == 64) for rows in (16, 64)),
    *(("attend", WIDE, rows, rows == 64) for rows in (16, 64)),
    ("attend", ODD, 16, False),
    *(("merge", EXTRAS, rows, False) for rows in (1, 8, 32, 4096)),
    ("schedule", EXTRAS, 16, False),
]


def test_every_kernel_fits_hopper() -> None:
    wanted = [[name, spec, rows, shared] for name, spec, rows, shared in CASES]
    script = Path(__file__).with_name("aot_build.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CASES)
    problems = [
        f"{case}: {problem} in {use}"
        for case, use in zip(CASES, found, strict=True)
        for problem in complaints(case, use)
    ]
    assert not problems, "\n".join(problems)


def complaints(case: Case, use: dict[str, Any]) -> Iterator[str]:
    """What breaks a promise of `tiles`."""
    name, fields, rows, shared = case
    spec = AttentionSpec(**{key: value for key, value in fields.items() if key != "dtype"})
    tile = tile_for(spec, rows)
    if use["STACK"] or use["LOCAL"]:
        yield "spilled registers"
    if name != "attend":
        return
    if use["REG"] > tile.limit(spec, shared=shared):
        yield "too many registers"
    if tile.limit(spec, shared=shared) == tile.beside:
        small = tile_for(spec, 16)
        threads = use["REG"] * tile.all_warps + small.registers * small.warps
        if threads * 32 > SM_REGISTERS:
            yield "no room for a private program beside it"
    if -(-use["REG"] // 8) * 8 * 32 * tile.all_warps * tile.ctas > SM_REGISTERS:
        yield f"registers for fewer than {tile.ctas} programs"
    if (use["shared"] + CTA_SHARED) * tile.ctas > SM_SHARED:
        yield f"shared memory for fewer than {tile.ctas} programs"
    if use["wgmma"] != (tile.rows >= 64):
        yield "the wrong tensor core instruction"
    # The pipeliner must spend its stages on K and V: with the page id loaded in the loop instead
    # of one turn ahead, it keeps two buffers whatever `stages` says.
    width = 1 << (spec.head_dim - 1).bit_length()
    pair = 2 * tile.keys * width * spec.cache_dtype.itemsize
    if use["shared"] < (tile.stages - 1) * pair:
        yield "fewer buffers than stages"
