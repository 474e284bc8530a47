"""Every address that the kernels touch lies in a tensor they were given, on the grid of a real GPU."""

import gc
from typing import Any

import numpy as np
import pytest
import torch

from sagellm_ir.runtime.accel.attention import PrefixAttention
from sagellm_ir.runtime.accel.forest import SharedPrefix
from sagellm_ir.runtime.accel.selfcheck import random_batch
from sagellm_ir.runtime.accel.spec import AttentionSpec

SMS = 132
HALF = torch.float16


class Bounds:
    """The memory of all tensors there are, and the accesses outside of it."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.checked = self.outside = 0

    def take_stock(self) -> None:
        """Look at the tensors that are alive now."""
        tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
        # What oneDNN has laid out for itself has no address; no kernel gets it.
        storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
        self.spans = [(one.data_ptr(), one.data_ptr() + one.nbytes()) for one in storages]

    def check(self, pointers: Any, mask: Any) -> None:
        """Count what lies outside, of the addresses that the mask lets through."""
        at = np.asarray(pointers.data).astype(np.uint64)
        at = at[np.broadcast_to(np.asarray(mask.data, bool), at.shape)]
        inside = np.zeros(at.shape, bool)
        for low, high in self.spans:
            inside |= (at >= low) & (at < high)
        self.checked += at.size
        self.outside += int((~inside).sum())


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> Bounds:
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    found = Bounds()
    load, store, add = (
        Builder.create_masked_load,
        Builder.create_masked_store,
        Builder.create_atomic_rmw,
    )

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found.check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_add(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.check(pointers, mask)
        return add(self, how, pointers, value, mask, *rest)

    monkeypatch.setattr(Builder, "create_masked_load", checked_load)
    monkeypatch.setattr(Builder, "create_masked_store", checked_store)
    monkeypatch.setattr(Builder, "create_atomic_rmw", checked_add)
    allocate = PrefixAttention._allocate

    def of_a_gpu(self: PrefixAttention, workspace: int) -> None:
        self._sms = SMS
        allocate(self, workspace)

    monkeypatch.setattr(PrefixAttention, "_allocate", of_a_gpu)
    return found


CASES: dict[str, tuple[AttentionSpec, list[int], list[int], list[SharedPrefix]]] = {
    "one long sequence": (AttentionSpec(8, 1, 128, 64, HALF), [1], [8192], []),
    "chunk of a prompt": (AttentionSpec(7, 1, 64, 16, HALF), [40], [500], []),
    "a tree": (
        AttentionSpec(4, 2, 64, 16, HALF),
        [1, 2, 1, 5],
        [130, 70, 65, 5],
        [SharedPrefix(0, 64, (0, 1, 2))],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_no_access_outside_the_tensors(name: str, bounds: Bounds) -> None:
    spec, q_lens, kv_lens, groups = CASES[name]
    batch = random_batch(spec, q_lens, kv_lens, groups)
    kernels = PrefixAttention(
        spec, max_batch=8, max_rows=64, device="cpu", gate=None, workspace=1 << 20
    )
    kernels.update(batch.q_lens, batch.kv_lens, batch.groups)
    out = torch.empty_like(batch.q)
    bounds.take_stock()
    kernels.schedule(batch.lengths)
    kernels.run(batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.lengths, out)
    assert bounds.checked > out.numel()
    assert bounds.outside == 0


def test_an_access_outside_is_seen(bounds: Bounds) -> None:
    """Negative control: the last page of the keys is said to be no part of them, and is read."""
    spec = AttentionSpec(4, 2, 64, 16, HALF)
    batch = random_batch(spec, [1], [40])
    batch.block_table[0, 0] = len(batch.k_cache) - 1
    kernels = PrefixAttention(
        spec, max_batch=8, max_rows=64, device="cpu", gate=None, workspace=1 << 20
    )
    kernels.update(batch.q_lens, batch.kv_lens)
    out = torch.empty_like(batch.q)
    bounds.take_stock()
    keys, page = batch.k_cache.data_ptr(), batch.k_cache[0].nbytes
    bounds.spans = [(low, high - page * (low == keys)) for low, high in bounds.spans]
    kernels.schedule(batch.lengths)
    kernels.run(batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.lengths, out)
    assert bounds.outside >= spec.kv_heads * 16 * spec.head_dim
