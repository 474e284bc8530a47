"""What an engine compiles at start-up is what it launches later."""

from typing import Any

import pytest
import torch

import sagellm_ir.runtime.accel.attention as attention_module
from sagellm_ir.runtime.accel.attention import PrefixAttention
from sagellm_ir.runtime.accel.forest import SharedPrefix
from sagellm_ir.runtime.accel.gate import Gate
from sagellm_ir.runtime.accel.launch import merge_constants
from sagellm_ir.runtime.accel.selfcheck import largest_error, random_batch, tolerance
from sagellm_ir.runtime.accel.spec import AttentionSpec
from sagellm_ir.runtime.accel.warmup import warm_up

SPEC = AttentionSpec(14, 2, 64, 64, torch.float16)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Kernels by what they are compiled for; nothing is run."""
    found: set[Any] = set()

    def attend(
        spec: Any, tile: Any, *args: Any, shared: bool, beside: bool, late: bool, **_: Any
    ) -> None:
        late = late and not tile.wide  # Those have no such form.
        stride = args[1].table.stride(0)
        found.add(("attend", tile.rows, shared, beside, late, stride % 16 == 0))

    def merge(spec: Any, x: Any, *_: Any, shared: bool, early: bool) -> None:
        constants = merge_constants(spec, len(x.q), shared=shared, early=early)
        found.add(("merge", *constants.values()))

    def schedule(spec: Any, tile: Any, *_: Any, batch: int, **__: Any) -> None:
        found.add(("schedule", tile.rows, "one" if batch == 1 else batch % 16 == 0))

    monkeypatch.setattr(attention_module, "launch_attend", attend)
    monkeypatch.setattr(attention_module, "launch_merge", merge)
    monkeypatch.setattr(attention_module, "launch_schedule", schedule)
    return found


def attention(gate: Gate | None, max_batch: int, max_rows: int) -> PrefixAttention:
    return PrefixAttention(
        SPEC, max_batch=max_batch, max_rows=max_rows, device="cpu", gate=gate, workspace=1 << 20
    )


def test_every_kernel_of_later_batches_is_compiled(launched: set[Any]) -> None:
    kernels = attention(Gate(), 64, 8192)
    kernels._chain = True  # as on a GPU
    cache = torch.zeros(1, 64, 2, 64, dtype=torch.float16)
    warm_up(kernels, cache, cache)
    warm = set(launched)
    kernels.gate = None
    heights = set()
    for new in ([1], [1] * 2, [1] * 5, [1] * 16, [1] * 64, [4] * 3, [9] * 16, [700, 1], [5000, 2]):
        for shared in (0, 64, 16384):
            launched.clear()
            total = [(shared or 64) + tokens for tokens in new]
            groups = [SharedPrefix(0, shared, range(len(new)))] if shared and len(new) > 1 else []
            batch = random_batch(SPEC, new, total, groups, poison=False)
            kernels.update(new, total, groups)
            kernels.schedule(batch.lengths)
            args = (batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.lengths)
            kernels.run(*args, torch.empty_like(batch.q))
            assert launched, "nothing ran"
            assert launched <= warm, (new, shared)
            heights.add(kernels.variant.shared)
    assert heights == {0, 64, 128}


def test_the_attention_is_as_before() -> None:
    kernels = attention(Gate(), 4, 8)
    batch = random_batch(SPEC, [1, 1], [130, 140], [SharedPrefix(0, 128, (0, 1))])
    warm_up(kernels, batch.k_cache, batch.v_cache)
    assert kernels.gate == Gate()
    assert largest_error(kernels, batch) < tolerance(SPEC)
