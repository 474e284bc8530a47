"""Other tiles than `tiles.py` has, timed on the two kernels alone.

    python benchmarks/gpu/tune.py [--json FILE]      # a CUDA machine

A variant is kept if it wins here. Times include the reset of a counter, 1 to 2 us.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timing import Timer
from workloads import HEADS, K

from sagellm_ir.runtime.accel import AttentionSpec, SharedPrefix, worklist
from sagellm_ir.runtime.accel.attention import PrefixAttention
from sagellm_ir.runtime.accel.launch import LOG2E, launch_attend, launch_schedule
from sagellm_ir.runtime.accel.selfcheck import Batch, random_batch
from sagellm_ir.runtime.accel.tensors import Tensors
from sagellm_ir.runtime.accel.tiles import Tile

VARIANTS: tuple[tuple[bool, Tile], ...] = (
    *(
        (True, Tile(*shape))
        for shape in (
            (16, 64, 4, 2, 128, 4),
            (32, 64, 4, 3, 255, 2),
            (32, 64, 8, 3, 128, 2),
            (64, 64, 4, 2, 255, 2),
            (128, 64, 8, 3, 255, 1),
            (128, 64, 8, 3, 168, 1),
            (128, 64, 8, 2, 128, 2),
            (256, 64, 16, 3, 128, 1),
        )
    ),
    *(
        (False, Tile(*shape))
        for shape in (
            (16, 64, 4, 3, 168, 3),
            (16, 64, 4, 2, 128, 4),
            (16, 64, 8, 2, 128, 2),
            (16, 32, 4, 3, 128, 4),
        )
    ),
)
"""(shared kernel?, tile)."""


def _tensors(batch: Batch, spec: AttentionSpec) -> Tensors:
    return Tensors(
        *(batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.lengths),
        torch.empty_like(batch.q),
        *(None, None, None, spec.score_scale * LOG2E, 1.0),
    )


def variant(
    timer: Timer, spec: AttentionSpec, batch: Batch, shared: bool, tile: Tile
) -> dict[str, Any]:
    """Time of one launch of `attend` with a tile that `tiles.py` need not have."""
    kernels = PrefixAttention(spec, max_batch=256, max_rows=256, device="cuda", gate=None)
    with patch.object(worklist, "tile_for", lambda spec, rows: tile):  # For the host's list.
        kernels.update(batch.q_lens, batch.kv_lens, batch.groups)
    x, lists = _tensors(batch, spec), kernels._lists
    items, sizes = kernels._meta.device("items"), kernels._meta.device("sizes")
    if not shared:
        items, sizes = kernels._items, kernels._sizes
        launch_schedule(
            *(spec, tile, batch.lengths, lists, items, sizes),
            max_batch=256,
            batch=len(batch.q_lens),
        )
    grid = kernels._sms * tile.ctas

    def work() -> None:
        lists.taken.zero_()  # As `merge` does.
        launch_attend(spec, tile, grid, x, lists, items, sizes, shared=shared, early=False)

    return {"us": timer.seconds(work)[0] * 1e6, "items": int(sizes[0]), "tile": str(tile)}


def tiles(timer: Timer, heads: str) -> list[dict[str, Any]]:
    """Every variant on batches of one kernel each."""
    spec = AttentionSpec(*HEADS[heads], 128, 64)
    rows = []
    for shared, size, batch in (
        *((True, 32, batch) for batch in (8, 32, 64, 256)),
        *((False, 1, 64), (False, 1, 256), (False, 32, 8), (False, 32, 1), (False, 0.25, 64)),
    ):
        tokens = int(size * K)
        groups = [SharedPrefix(0, tokens, range(batch))] if shared else []
        inputs = random_batch(
            *(spec, [1] * batch, [tokens + 1] * batch, groups), device="cuda", poison=False
        )
        for of_shared, tile in VARIANTS:
            if of_shared != shared or (shared and tile.rows > 2 * batch * spec.group):
                continue
            found = variant(timer, spec, inputs, shared, tile)
            pairs = batch * tokens
            found["TFLOP/s"] = 4e-6 * pairs * spec.heads * spec.head_dim / found["us"]
            read = tokens if shared else pairs
            found["TB/s"] = read * spec.token_bytes * 1e-6 / found["us"]
            name = f"{heads} {'shared' if shared else 'private'} keys={tokens} B={batch}"
            rows.append({"name": name} | found)
            print(
                f"{name:<42} {found['us']:8.1f} us {found['TFLOP/s']:6.0f} TFLOP/s "
                f"{found['TB/s']:5.2f} TB/s {found['items']:6} items  {found['tile']}",
                flush=True,
            )
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("tune.json"))
    parser.add_argument("--heads", choices=HEADS, nargs="*", default=["llama-3-8b", "qwen2.5-7b"])
    options = parser.parse_args()
    timer = Timer()
    rows = [row for heads in options.heads for row in tiles(timer, heads)]
    options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
