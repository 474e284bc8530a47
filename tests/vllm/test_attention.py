"""Our kernels inside vLLM's attention: what they are told, what they read, and where they are not used."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder

from sagellm_ir.lowering.plan import PrefixGroup
from sagellm_ir.runtime.accel import AccelConfig, AttentionSpec, Gate, SharedPrefix
from sagellm_ir.runtime.accel.reference import reference
from sagellm_ir.runtime.engines.vllm import attention
from sagellm_ir.runtime.engines.vllm.attention import (
    KernelBatches,
    PrefixAwareBackend,
    PrefixAwareImpl,
    Step,
    batches_of,
)

SPEC = AttentionSpec(8, 2, 16, 16, torch.float16)


class Kernels:
    """Stands in for `PrefixAttention`: notes what it is told, and attends as the reference does."""

    spec, gate, max_batch = SPEC, None, 16

    def __init__(self) -> None:
        self.told: list[tuple[list[int], list[SharedPrefix], int]] = []
        self.scheduled = 0
        self.variant = SimpleNamespace(shared=64)

    def update(self, new: Any, total: Any, groups: Any, *, tile: int) -> None:
        assert (new == np.ones(len(total))).all()
        self.told.append((total.tolist(), groups, tile))

    def schedule(self, lengths: torch.Tensor) -> None:
        self.scheduled += 1

    def run(self, q: Any, k: Any, v: Any, table: Any, lengths: Any, out: torch.Tensor) -> None:
        assert len(q) == len(out) == len(lengths)
        out.copy_(reference(SPEC, q, k, v, table, [1] * len(q), lengths.tolist()))


def batch(*total: int, new: Sequence[int] = ()) -> Any:
    """vLLM's description of one: all tokens of each row, and those that are new (1 each)."""
    new = new or [1] * len(total)
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0).int()
    lengths = torch.tensor(total, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(total),
        num_actual_tokens=sum(new),
        max_query_len=max(new),
        max_seq_len=max(total),
        block_table_tensor=torch.arange(len(total) * 2).view(-1, 2),
        slot_mapping=torch.arange(sum(new)),
    )


def batches(kernels: Kernels, *sizes: int) -> KernelBatches:
    places = {name: at for at, name in enumerate("abcd")}
    made: Any = KernelBatches
    found: KernelBatches = made(kernels, "layer.0", sizes, lambda: places)
    return found


def test_rows_that_have_computed_a_prefix_are_told() -> None:
    kernels = Kernels()
    told = batches(kernels)
    told.groups = [
        PrefixGroup(0, 32, tuple("dba")),
        PrefixGroup(32, 48, tuple("ad")),
        PrefixGroup(48, 64, tuple("ad")),
    ]
    step = told.step(batch(64, 33, 20, 65))
    assert isinstance(step, Step)
    assert step.first == "layer.0"
    # Row 0's newest token is its 64th: it has not computed [48, 64) before this forward.
    groups = [SharedPrefix(0, 32, [3, 1, 0]), SharedPrefix(32, 48, [0, 3])]
    assert kernels.told == [([64, 33, 20, 65], groups, 0)]


def test_decodes_beside_a_prefill() -> None:
    """Those that come first, and are not the prefill's rows."""
    kernels = Kernels()
    told = batches(kernels, 4)
    told.groups = [PrefixGroup(0, 32, tuple("abd"))]
    step = told.step(batch(64, 33, 40, 65, new=[1, 1, 8, 1]))
    assert step
    assert step.rows == 2
    assert kernels.told == [([64, 33], [SharedPrefix(0, 32, [0, 1])], 0)]  # no CUDA graph's tiles


def test_what_has_not_changed_is_not_told_again() -> None:
    kernels = Kernels()
    told = batches(kernels)
    told.groups = [PrefixGroup(0, 32, tuple("ab"))]
    for length in range(40, 50):
        assert told.step(batch(length, length))
    assert len(kernels.told) == 1
    told.step(batch(4096, 50))  # much longer
    told.step(batch(4096, 50, 1))  # one more row
    told.groups = [PrefixGroup(0, 16, tuple("ab"))]
    told.step(batch(4096, 50, 1))
    assert [total for total, *_ in kernels.told[1:]] == [[4096, 50], [4096, 50, 1], [4096, 50, 1]]


def test_vllm_attends_where_nothing_is_gained() -> None:
    kernels = Kernels()
    told = batches(kernels)
    assert told.step(batch(40, 40)) is None  # nothing is shared
    told.groups = [PrefixGroup(0, 32, tuple("ab"))]
    assert told.step(batch(40, 40, new=[1, 7])) is None  # nobody to share with, but a prefill
    assert told.step(batch(40, 40, new=[7, 7])) is None
    assert told.step(batch(*[40] * 17)) is None  # more rows than there are buffers for
    assert not kernels.told
    kernels.variant.shared = 0
    assert told.step(batch(40, 40)) is None  # the gate says that it does not pay
    assert len(kernels.told) == 1


def test_a_cuda_graph_keeps_its_kernels() -> None:
    """Whatever is shared, one height of tiles; rows that fill it up have no tokens."""
    kernels = Kernels()
    told = batches(kernels, 1, 4, 64)
    height = Gate().tile_rows(SPEC, [(4, attention.USUAL)])
    kernels.variant.shared = 0
    assert told.step(batch(40, 40, 40, 0))
    told.groups = [PrefixGroup(0, 32, tuple("ab"))]
    assert told.step(batch(41, 41, 0, 0))
    assert [(total, tile) for total, _, tile in kernels.told] == [
        ([40, 40, 40, 0], height),
        ([41, 41, 0, 0], height),
    ]
    told.groups = ()
    assert told.step(batch(40)) is None  # nobody to share with: vLLM's own, in its graph too
    assert told.step(batch(*[40] * 64)) is None


def implementation(**fields: Any) -> Any:
    made: Any = object.__new__(PrefixAwareImpl)
    usual: dict[str, Any] = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_size": 16,
        "scale": 0.25,
        "sinks": None,
    }
    usual |= {"alibi_slopes": None, "attn_type": "decoder", "kv_cache_dtype": "auto"}
    made.__dict__ |= usual | {"sliding_window": (-1, -1), "logits_soft_cap": 0} | fields
    return made


def test_a_forward_of_two_layers() -> None:
    """Keys and values are where vLLM's cache has them; padding of `query` stays as it was."""
    torch.manual_seed(0)
    lengths, page = [37, 16, 5], SPEC.block_size
    cache = (
        torch.randn(8, 2, page, 2 * 16, dtype=torch.float16)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
    )  # as vLLM keeps it: tokens before heads
    table = torch.tensor([[5, 2, 7], [1, 0, 0], [3, 0, 0]], dtype=torch.int32)
    query = torch.randn(4, 8, 16, dtype=torch.float16)
    kernels: Any = Kernels()
    meta = SimpleNamespace(
        num_actual_tokens=3,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        step=Step(kernels, "layer.0", 3),
        others=None,
    )
    for layer in ("layer.0", "layer.1"):
        out = torch.full_like(query, math.nan)
        named = SimpleNamespace(layer_name=layer)
        implementation().forward(named, query, query, query, cache, meta, out)
        for row, length in enumerate(lengths):
            at = torch.arange(length)
            held = cache[table[row, at // page].long(), :, at % page].double()  # tokens, heads, 2 D
            keys, values = held.repeat_interleave(4, 1).chunk(2, -1)
            scores = torch.einsum("hd,thd->ht", query[row].double(), keys) / 4
            expected = torch.einsum("ht,thd->hd", scores.softmax(-1), values)
            assert (out[row].double() - expected).abs().max() < 2e-3
        assert out[3].isnan().all()
    assert kernels.scheduled == 1


def test_rows_that_vllm_attends_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """All without a step, and those behind its rows."""
    asked = []

    def theirs(self: Any, layer: Any, query: Any, *more: Any) -> None:
        key, value, _, meta, output = more
        assert len(query) == len(key) == len(value) == len(output)
        asked.append((meta, query[0, 0, 0].item()))
        output.fill_(1)

    monkeypatch.setattr(FlashAttentionImpl, "forward", theirs)
    kernels: Any = SimpleNamespace(run=lambda *tensors: tensors[5].fill_(2))
    query = torch.arange(5.0)[:, None, None].expand(5, 8, 16)
    cache, lengths = torch.zeros(8, 2, 16, 32), torch.ones(5)
    for rows, others, seen in ((5, None, []), (2, "others", [("others", 2.0)])):
        meta = SimpleNamespace(
            seq_lens=lengths, block_table=None, step=Step(kernels, "", rows), others=others
        )
        layer, out = SimpleNamespace(layer_name="layer.1"), torch.zeros(5, 8, 16)
        implementation().forward(layer, query, query, query, cache, meta, out)
        assert out[:, 0, 0].tolist() == [2.0] * rows + [1.0] * (5 - rows)
        assert asked == seen
    asked.clear()
    meta.step = None
    implementation().forward(layer, query, query, query, cache, meta, out)
    assert asked == [(meta, 0.0)]


def test_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's, with our step, and without the list of work of vLLM's own kernel."""
    asked = []

    def build(self: Any, common_prefix_len: int, common: Any, fast_build: bool) -> Any:
        asked.append(fast_build)
        return SimpleNamespace(common=common)

    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", build)
    builder = object.__new__(PrefixAwareBackend.get_builder_cls())
    assert builder.build(0, batch(40, 40)).step is None
    builder.batches = batches(Kernels())
    assert builder.build(0, batch(40, 40)).step is None
    builder.batches.groups = [PrefixGroup(0, 32, tuple("ab"))]
    made = builder.build(0, batch(40, 40))
    assert made.step
    assert made.others is None
    assert asked == [False, False, True]
    made = builder.build(0, batch(40, 40, 50, new=[1, 1, 8]))
    assert made.step.rows == 2
    assert asked[3:] == [True, False]
    rest, one = made.others.common, batch(50, new=[8])
    assert rest.num_reqs == 1
    assert rest.num_actual_tokens == 8
    for name in ("query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound"):
        assert torch.equal(getattr(rest, name), getattr(one, name))
    assert rest.block_table_tensor.tolist() == [[4, 5]]
    assert rest.slot_mapping.tolist() == [*range(2, 10)]
    assert not builder.use_cascade_attention(common_prefix_len=1 << 20)


def layers(*found: Any) -> dict[str, Any]:
    return {f"layer.{at}": SimpleNamespace(impl=impl) for at, impl in enumerate(found)}


def test_kernels_of_a_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Any] = []

    def make_attention(config: AccelConfig, spec: AttentionSpec, **sizes: Any) -> Any:
        made.append((spec, sizes["max_batch"], sizes["max_rows"]))
        return Kernels()

    monkeypatch.setattr(attention, "make_attention", make_attention)
    usual: dict[str, Any] = {
        "block_size": 64,
        "dtype": torch.bfloat16,
        "max_batch": 5000,
        "sizes": (2,),
        "rows": dict,
        "device": "cuda",
    }
    windowed = implementation(sliding_window=(99, 0), logits_soft_cap=30)
    assert batches_of(AccelConfig(), layers(windowed, windowed), **usual)
    spec = AttentionSpec(8, 2, 16, 64, scale=0.25, window=100, softcap=30.0)
    assert made == [(spec, 4096, 4096)]
    for odd in (
        [implementation(alibi_slopes=torch.ones(8))],
        [implementation(sinks=torch.ones(8))],
        [implementation(attn_type="encoder_only")],
        [implementation(kv_cache_dtype="fp8")],
        [implementation(), implementation(scale=0.5)],
        [object.__new__(FlashAttentionImpl)],
    ):
        caplog.clear()
        assert batches_of(AccelConfig(), layers(*odd), **usual) is None
        assert "prefix-aware attention is off" in caplog.text
    assert len(made) == 1
