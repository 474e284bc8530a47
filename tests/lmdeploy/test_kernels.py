"""Prefix-aware attention wired into LMDeploy, on a CPU: the kernels run in Triton's interpreter."""

import importlib
import os
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

if "triton" not in sys.modules:  # it decides when it is imported whether it interprets
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("sagellm_ir.runtime.accel.kernels")
    importlib.import_module("triton.experimental.gluon")  # Triton imports it at the first launch.
    del os.environ["TRITON_INTERPRET"]

from lmdeploy.pytorch.backends.cuda import attention as backend
from lmdeploy.pytorch.backends.cuda import graph_runner
from lmdeploy.pytorch.backends.cuda.attention import TritonAttentionMetadata

from sagellm_ir.runtime.accel import AccelConfig, AttentionSpec, SharedPrefix
from sagellm_ir.runtime.accel.attention import PrefixAttention
from sagellm_ir.runtime.accel.reference import reference
from sagellm_ir.runtime.accel.selfcheck import random_batch, tolerance
from sagellm_ir.runtime.engines.lmdeploy.kernels.prefix_aware_attention import (
    KernelBatches,
    PrefixAwareAttention,
    install,
    prefill_gains,
    spec_of,
)
from sagellm_ir.runtime.engines.lmdeploy.rows import BatchRows

SPEC = AttentionSpec(4, 2, 64, 16, dtype=torch.float16)


class Inner:
    """LMDeploy's layer, without its kernels: it writes the cache and counts what it is asked."""

    alibi, causal, sliding_window, logit_softcapping = False, True, None, None
    num_heads, num_kv_heads, head_size, v_head_size = 4, 2, 64, 64
    scale = SPEC.score_scale

    def __init__(self, *_: Any, **__: Any) -> None:
        self.forwards = self.fills = 0

    def forward(self, query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.forwards += 1
        return torch.zeros_like(query)

    def fill_kv_cache(
        self, key: Any, value: Any, k_cache: Any, v_cache: Any, *_: Any, **more: Any
    ) -> None:
        self.fills += 1
        assert more["kv_seq_length"] is not None
        assert more["block_offsets"] is not None


def steps(rows: int, first: PrefixAwareAttention) -> KernelBatches:
    attention = PrefixAttention(
        SPEC, max_batch=8, max_rows=rows, device="cpu", gate=None, workspace=1 << 20
    )
    return KernelBatches(attention, first)


def metadata(batch: Any, groups: list[tuple[int, int, int, int]], decode: bool) -> Any:
    new, total = np.array(batch.q_lens, np.int32), np.array(batch.kv_lens, np.int32)
    lens = torch.tensor(batch.q_lens)
    said = BatchRows(new, total, np.array(groups, np.int32).reshape(-1, 4))
    return TritonAttentionMetadata(
        is_decoding=decode,
        block_offsets=batch.block_table,
        q_start_loc=lens.cumsum(0) - lens,
        q_seqlens=lens,
        kv_seqlens=torch.tensor(batch.kv_lens),
        prefix_groups=said,
    )


@pytest.mark.parametrize("new", [[1, 1, 1], [3, 1, 2]])
def test_a_forward_gives_what_the_reference_gives(new: list[int]) -> None:
    total = [80 + 5 + new[0], 80 + 16 + new[1], 80 + new[2]]
    batch = random_batch(SPEC, new, total, [SharedPrefix(0, 80, range(3))], poison=False)
    layers = [PrefixAwareAttention(Inner()) for _ in range(2)]
    told = steps(16, layers[0])
    meta = metadata(batch, [(0, 80, 0, 3)], decode=max(new) == 1)
    told.prepare(meta, None)
    expected = reference(SPEC, batch.q, batch.k_cache, batch.v_cache, batch.block_table, new, total)
    for layer in layers:
        out = layer.forward(
            *(batch.q, batch.k_cache[:0], batch.v_cache[:0], batch.k_cache, batch.v_cache, meta)
        )
        error = (out.double() - expected).abs() / (1 + expected.abs())
        assert error.max() < tolerance(SPEC)
        assert (layer.inner.fills, layer.inner.forwards) == (1, 0)


def test_the_kernels_are_told_once_for_the_forwards_of_a_decode() -> None:
    batch = random_batch(SPEC, [1, 1], [40, 50], [SharedPrefix(0, 32, range(2))], poison=False)
    told = steps(8, PrefixAwareAttention(Inner()))
    updates: list[Any] = []
    update = told.attention.update
    told.attention.update = lambda *a: updates.append(a) or update(*a)  # type: ignore[method-assign, func-returns-value]
    first = metadata(batch, [(0, 32, 0, 2)], decode=True)
    said = first.prefix_groups
    for _ in range(3):
        meta = metadata(batch, [], decode=True)
        meta.prefix_groups = said
        told.prepare(meta, 4)
        assert meta.prefix_groups.kv_lens is None  # the graph's buffer is read
    (once,) = updates
    assert once[0].tolist() == [1] * 4
    assert once[1].tolist() == [40, 50, 0, 0]
    assert [(g.start, g.stop, list(g.rows)) for g in once[2]] == [(0, 32, [0, 1])]


def test_forwards_that_gain_nothing_run_lmdeploys_own_kernels() -> None:
    layer = PrefixAwareAttention(Inner())
    told = steps(64, layer)
    alone = random_batch(SPEC, [1, 1], [40, 50], poison=False)
    fresh = random_batch(SPEC, [20, 30], [20, 30], poison=False)
    for batch, decode in ((alone, True), (fresh, False)):
        meta = metadata(batch, [], decode)
        told.prepare(meta, None)
        assert meta.prefix_groups is None
        layer.forward(batch.q, None, None, batch.k_cache, batch.v_cache, meta)  # type: ignore[arg-type]
    dummy = metadata(alone, [], True)
    dummy.prefix_groups = None
    told.prepare(dummy, 4)
    assert dummy.prefix_groups is None
    assert layer.inner.forwards == 2


@pytest.mark.parametrize(
    ("new", "total", "wide", "gains"),
    [
        ([8192], [8192], True, True),  # a long prompt
        ([8192], [16384], True, True),
        ([8192], [16384], False, False),
        ([1024] * 8, [1024] * 8, True, False),  # short ones: few keys
        ([1024], [16384], True, False),  # few tokens: the host is slower than the device
        ([128] * 64, [8320] * 64, False, True),  # much history, which need not be copied
        ([1024] * 2, [2048, 9216], True, True),
    ],
)
def test_which_prefills_gain(new: list[int], total: list[int], wide: bool, gains: bool) -> None:
    assert prefill_gains(np.array(new, np.int32), np.array(total, np.int32), wide) is gains


def test_a_group_computed_in_the_same_forward_is_not_read_as_history() -> None:
    said = BatchRows(
        np.array([32, 4], np.int32),
        np.array([32, 36], np.int32),
        np.array([[0, 32, 0, 2]], np.int32),
    )
    assert said.readable() == []


def test_what_continues_a_group_that_is_left_out_is_left_out_with_it() -> None:
    """The kernels refuse a group that hangs in the air."""
    new, total = np.array([32, 4, 1], np.int32), np.array([32, 52, 50], np.int32)
    inner = [32, 48, 1, 2]
    hanging = BatchRows(new, total, np.array([[0, 32, 0, 3], inner], np.int32))
    assert hanging.readable() == []
    whole = BatchRows(new, total, np.array([[0, 32, 1, 2], inner], np.int32))
    assert whole.readable() == [(0, 32, range(1, 3)), (32, 48, range(1, 3))]


def test_installing_wraps_what_lmdeploy_builds_and_can_be_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "TritonAttentionImpl", Inner)
    stock, runner = backend.TritonAttentionBuilder.build, graph_runner.CUDAGraphRunner
    uninstall = install(AccelConfig())
    build = backend.TritonAttentionBuilder.build
    assert isinstance(build(4, 64), PrefixAwareAttention)
    assert not isinstance(build(4, 64, learnable_sink=True), PrefixAwareAttention)
    assert issubclass(graph_runner.CUDAGraphRunner, runner)
    uninstall()
    assert backend.TritonAttentionBuilder.build is stock
    assert graph_runner.CUDAGraphRunner is runner
    install(AccelConfig(mode="off"))
    assert backend.TritonAttentionBuilder.build is stock


def test_the_spec_of_a_layer() -> None:
    cache = types.SimpleNamespace(block_size=16, quant_policy=0)
    assert spec_of(Inner(), cache, torch.float16) == AttentionSpec(
        4, 2, 64, 16, dtype=torch.float16, scale=SPEC.score_scale
    )
    windowed = Inner()
    windowed.sliding_window = (7, 7)  # type: ignore[assignment]
    found = spec_of(windowed, cache, torch.float16)
    assert found is not None
    assert found.window == 8
    cache.quant_policy = 4
    assert spec_of(Inner(), cache, torch.float16) is None
