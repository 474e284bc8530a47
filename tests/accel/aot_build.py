"""Build the kernels for sm_90 without a GPU; print what each uses, as JSON lines.

`--all` builds `attend` for every head_dim, block size, cache format and tile (about 10 minutes).
Run by `test_aot.py` in a process of its own: the other tests run the kernels in Triton's
interpreter, and a process has either the interpreter or the compiler.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from sagellm_ir.runtime.accel import kernels
from sagellm_ir.runtime.accel.launch import (
    attend_constants,
    boxes,
    merge_constants,
    schedule_constants,
    stride_constants,
    wide_constants,
)
from sagellm_ir.runtime.accel.spec import BLOCK_SIZES, HEAD_DIMS, KV_FORMATS, AttentionSpec
from sagellm_ir.runtime.accel.tiles import Tile, tile_for, tile_heights

POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def build(
    kernel: Any,
    spec: AttentionSpec,
    constants: Mapping[str, object],
    tile: Tile | None,
    shared: bool = False,
) -> dict[str, Any]:
    """Compile one kernel; registers, bytes of stack (spills) and of shared memory."""
    cache, data = POINTER[spec.cache_dtype], POINTER[spec.dtype]
    scales = data if spec.kv == "int8" else cache
    types = {"q_ptr": data, "k_ptr": cache, "v_ptr": cache, "ks_ptr": scales, "vs_ptr": scales}
    types |= {"out_ptr": data, "part_ptr": "*fp32", "lse_ptr": "*fp32"}
    types |= {"qk_scale": "fp32", "out_scale": "fp32"}
    types |= dict.fromkeys(("k_cache", "v_cache"), _boxes(spec))
    types |= dict.fromkeys(("batch", "item_cap", "part_cap"), "i32")
    types["sinks"] = data if spec.sinks else "constexpr"
    if not spec.sinks and "sinks" in kernel.arg_names:
        constants = {**constants, "sinks": None}
    signature = {}
    aligned = {}
    for index, name in enumerate(kernel.arg_names):
        stride = name.endswith("stride")
        default = "constexpr" if name in constants else "i32" if stride else "*i32"
        signature[name] = types.get(name, default)
        # What the launcher finds out by itself: pointers and most strides are multiples of 16.
        odd = name == "table_stride"
        if signature[name].startswith("*") or (signature[name] == "i32" and stride and not odd):
            aligned[(index,)] = [["tt.divisibility", 16]]
    values = {
        (kernel.arg_names.index(name),): value
        for name, value in constants.items()
        if name in kernel.arg_names
    }
    options = {name: value for name, value in constants.items() if name == "num_warps"}
    if tile:
        limit = tile.limit(spec, shared=shared)
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": limit}
    of = GluonASTSource if tile and tile.wide else ASTSource
    source = of(kernel, signature, constexprs=values, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
    found: dict[str, Any] = {key: int(value) for key, value in numbers}
    found |= {"shared": binary.metadata.shared, "wgmma": "wgmma.mma" in binary.asm["ptx"]}
    return found | {"copies": binary.asm["ptx"].count("cp.async.cg")}


def _boxes(spec: AttentionSpec) -> str:
    """The type of a descriptor of a cache."""
    of = boxes(torch.empty(2, spec.block_size, spec.kv_heads, spec.head_dim, dtype=spec.dtype))
    return f"tensordesc<{POINTER[spec.dtype][1:]}{of.block_shape},{of.layout!r}>"


def everything() -> Iterator[tuple[str, dict[str, Any], int, bool]]:
    """Every `attend` without window, soft cap and sinks."""
    for head_dim, block, kv in itertools.product(HEAD_DIMS, BLOCK_SIZES, KV_FORMATS):
        fields: dict[str, Any] = {
            "heads": 28,
            "kv_heads": 4,
            "head_dim": head_dim,
            "block_size": block,
            "kv": kv,
        }
        for rows, shared in itertools.product(tile_heights(AttentionSpec(**fields)), (True, False)):
            yield "attend", fields, rows, shared


def main() -> None:
    """Read [name, spec, tile rows or 0, shared] from standard input, write one line each."""
    whole = sys.argv[1:] == ["--all"]
    for name, fields, rows, shared in everything() if whole else json.load(sys.stdin):
        spec = AttentionSpec(**fields | {"dtype": getattr(torch, fields.get("dtype", "bfloat16"))})
        if name == "attend":
            tile = tile_for(spec, rows)
            cache = torch.empty(2, spec.block_size, spec.kv_heads, spec.head_dim, device="meta")
            scales = cache[..., :2].contiguous() if spec.kv == "int8" else cache
            constants = attend_constants(spec, tile, shared=shared, early=True, beside=not shared)
            constants |= stride_constants(cache, cache, scales, scales)
            kernel: Any = kernels.attend
            if tile.wide:
                kernel = kernels.attend_wide
                constants = wide_constants(spec, tile, shared=shared, early=True, beside=not shared)
            found = build(kernel, spec, constants, tile, shared)
        elif name == "merge":
            of_merge = merge_constants(spec, rows, shared=True, early=True)
            found = build(kernels.merge, spec, of_merge, None)
        else:
            constants = schedule_constants(spec, tile_for(spec, rows), 256)
            found = build(kernels.schedule, spec, constants, None)
        print(json.dumps(found | {"case": [fields, rows, shared]} if whole else found), flush=True)


if __name__ == "__main__":
    main()
