"""What the copy engine is told of a cache, and which caches it can read."""

from typing import Any

import pytest
import torch
from attrs import fields

from sagellm_ir.runtime.accel import kernels, launch
from sagellm_ir.runtime.accel.launch import Lists, boxes, has_boxes
from sagellm_ir.runtime.accel.spec import AttentionSpec
from sagellm_ir.runtime.accel.tensors import Tensors
from sagellm_ir.runtime.accel.tiles import tile_for

BOTH = torch.zeros(6, 2, 64, 4, 128, dtype=torch.bfloat16)
"""Pages that hold keys and values in turn."""
PADDED = torch.zeros(6, 64, 516, dtype=torch.bfloat16).as_strided(
    (6, 64, 4, 128), (64 * 516, 516, 128, 1)
)
"""Each token's heads are followed by 8 bytes."""


@pytest.mark.parametrize("cache", [BOTH[:, 0].contiguous(), BOTH[:, 0], BOTH[:, 1]])
def test_boxes_are_the_rows_of_one_page_and_head(cache: torch.Tensor) -> None:
    assert has_boxes(cache)
    found = boxes(cache)
    assert found.base.data_ptr() == cache.data_ptr()
    assert (found.shape, found.strides) == ([*cache.shape], [*cache.stride()])
    assert found.block_shape == [1, 64, 1, 64]


@pytest.mark.parametrize("cache", [PADDED, BOTH[:, 0, ..., 4:68]])
def test_no_boxes_where_an_address_or_a_stride_is_odd(cache: torch.Tensor) -> None:
    assert not has_boxes(cache)


class Recorder:
    """Stands for a kernel, and notes the sizes of its tiles."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int, int]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *_, **how: self.launches.append((how["BM"], how["BN"], how["num_warps"]))


@pytest.mark.parametrize("plain", [True, False])
def test_a_cache_without_boxes_gets_the_kernel_without_roles(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, attend = Recorder(), Recorder()
    monkeypatch.setattr(launch, "_interpreted", lambda: False)
    monkeypatch.setattr(kernels, "attend_wide", wide)
    monkeypatch.setattr(kernels, "attend", attend)
    spec = AttentionSpec(8, 4, 128, 64)
    cache = BOTH[:, 0] if plain else PADDED
    q, ints = torch.zeros(1, 8, 128), torch.zeros(8, dtype=torch.int32)
    x = Tensors(q, cache, cache, ints[None], ints, q, None, None, None, 1.0, 1.0)
    lists = Lists(*[ints] * len(fields(Lists)))
    how = {"shared": True, "early": True}
    launch.launch_attend(spec, tile_for(spec, 128), 132, x, lists, ints, ints, **how)
    assert (wide.launches, attend.launches) == (
        ([(128, 128, 4)], []) if plain else ([], [(128, 64, 8)])
    )
