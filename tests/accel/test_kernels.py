"""The kernels in Triton's interpreter against the reference in float64.

An iteration of a program costs milliseconds here, so shapes are small; every test poisons what
must not be read (see `selfcheck`).
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import sagellm_ir.runtime.accel.attention as attention_module
from sagellm_ir.runtime.accel.attention import PrefixAttention, Variant
from sagellm_ir.runtime.accel.forest import SharedPrefix
from sagellm_ir.runtime.accel.gate import Gate
from sagellm_ir.runtime.accel.selfcheck import largest_error, random_batch, tolerance
from sagellm_ir.runtime.accel.spec import AttentionSpec

# tanh of a large score goes through exp2 of a larger one, and is 1 as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")

HALF = torch.float16
Tree = tuple[int, list[int], list[int], list[SharedPrefix]]
"""Block size, new tokens, all tokens, groups."""
TREE = [SharedPrefix(0, 64, (0, 1, 2)), SharedPrefix(64, 192, (2, 0)), SharedPrefix(0, 128, (4, 5))]


def attention(
    spec: AttentionSpec, *, workspace: int = 1 << 20, max_batch: int = 8, max_rows: int = 64
) -> PrefixAttention:
    return PrefixAttention(
        spec,
        max_batch=max_batch,
        max_rows=max_rows,
        device="cpu",
        gate=None,
        workspace=workspace,
    )


def check(
    spec: AttentionSpec,
    q_lens: list[int],
    kv_lens: list[int],
    groups: Sequence[SharedPrefix] = (),
    **options: int,
) -> PrefixAttention:
    batch = random_batch(spec, q_lens, kv_lens, groups)
    kernels = attention(spec, **options)
    assert largest_error(kernels, batch) < tolerance(spec)
    return kernels


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(4, 2, 64, 16, HALF),
        AttentionSpec(8, 1, 128, 64, torch.bfloat16),
        AttentionSpec(7, 1, 64, 32, HALF),
        AttentionSpec(14, 2, 80, 16, HALF),
        AttentionSpec(3, 3, 96, 64, HALF),
        AttentionSpec(2, 1, 256, 16, HALF),
        AttentionSpec(4, 2, 64, 16, HALF, kv="int8"),
        AttentionSpec(7, 1, 128, 64, torch.bfloat16, kv="int8"),
        AttentionSpec(4, 1, 64, 16, HALF, kv="fp8"),
        AttentionSpec(4, 1, 64, 32, torch.bfloat16, kv="fp8", softcap=10.0, sinks=True),
        AttentionSpec(4, 1, 64, 16, HALF, window=70, sinks=True),
        AttentionSpec(4, 1, 64, 64, HALF, kv="int8", window=20, softcap=5.0, scale=0.3),
    ],
    ids=lambda spec: f"{spec.heads}x{spec.kv_heads}x{spec.head_dim}-{spec.block_size}-{spec.kv}",
)
def test_decode_over_trees(spec: AttentionSpec) -> None:
    # Two groups, one with a nested group; a sequence that shares nothing; one with a single key.
    kernels = check(spec, [1] * 7, [210, 81, 199, 1, 129, 130, 100], TREE)
    assert kernels.variant.shared


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("window", [0, 30])
def test_extend_with_a_causal_tail(block_size: int, window: int) -> None:
    # 7 heads a group: a query's heads lie in two tiles. Chunks of 5, 17, 1 and 6 new tokens.
    spec = AttentionSpec(7, 1, 64, block_size, HALF, window=window)
    check(spec, [5, 17, 1, 6], [200, 230, 65, 6], [SharedPrefix(0, 64, (0, 1, 2))])


@pytest.mark.parametrize("total", [78, 79, 80])
def test_a_query_at_the_edge_of_a_tile_of_keys(total: int) -> None:
    """The first of 16 queries sees 63, 64 or 65 keys: only whole tiles of 64 go without masks."""
    check(AttentionSpec(4, 1, 64, 16, HALF), [16], [total])


def test_pages_need_not_be_contiguous_in_the_cache() -> None:
    """K and V interleaved in one allocation, heads before rows: only the last stride is fixed."""
    spec = AttentionSpec(4, 2, 64, 16, HALF)
    batch = random_batch(spec, [1, 1], [40, 41], [SharedPrefix(0, 32, (0, 1))])
    both = torch.stack([batch.k_cache, batch.v_cache], 1).transpose(2, 3).contiguous()
    k, v = both.transpose(2, 3).unbind(1)
    q = torch.stack([batch.q, batch.q], 1)[:, 1]
    out = torch.empty(2, 4, 2, 64, dtype=HALF)[:, :, 0]
    kernels = attention(spec)
    kernels.update(batch.q_lens, batch.kv_lens, batch.groups)
    kernels.schedule(batch.lengths)
    kernels.run(q, k, v, batch.block_table, batch.lengths, out)
    plain = torch.empty_like(batch.q)
    kernels.run(batch.q, *(batch.k_cache, batch.v_cache), batch.block_table, batch.lengths, plain)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("gate", [None, Gate(launch=0.0, node=0.0, slot=0.0)])
def test_batches_of_one_cuda_graph(tile: int, gate: Gate | None) -> None:
    """The same kernels serve what is shared by all, by some, by none, and padding."""
    spec = AttentionSpec(8, 1, 128, 64, HALF)
    kernels = attention(spec)
    kernels.gate = gate
    both = SharedPrefix(0, 128, (0, 1, 2)), SharedPrefix(128, 192, (0, 2))
    cases: list[tuple[list[int], Sequence[SharedPrefix]]] = [
        ([210, 131, 200, 140], both),
        ([210, 131, 200, 140], ()),
        ([70, 300, 1, 64], [SharedPrefix(0, 64, (0, 1))]),
        ([70, 130, 0, 0], [SharedPrefix(0, 64, (0, 1))]),
        ([70, 130, 0, 0], ()),
    ]
    for kv_lens, groups in cases:
        batch = random_batch(spec, [1] * 4, kv_lens, groups)
        assert largest_error(kernels, batch, tile=tile) < tolerance(spec)
        assert kernels.variant == Variant(16, tile)


def test_without_groups_only_the_plain_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    real = getattr(attention_module, "launch_attend")  # noqa: B009 (not exported)

    def spy(*args: Any, shared: bool, **options: bool) -> None:
        launched.append(shared)
        real(*args, shared=shared, **options)

    monkeypatch.setattr(attention_module, "launch_attend", spy)
    kernels = check(AttentionSpec(4, 2, 64, 16, HALF), [1, 1, 1], [37, 80, 1])
    assert launched == [False]
    assert kernels.variant == Variant(private=16, shared=0)


@pytest.mark.parametrize("programs", [1, 2])
def test_some_programs_share_and_the_others_take_all(
    monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    """As on a divided device: few programs have the nodes, and no private item belongs to a program."""
    real = getattr(attention_module, "launch_attend")  # noqa: B009 (not exported)

    def divided(*args: Any, shared: bool, late: bool, **options: bool) -> None:
        if shared:
            args[6][1] = programs
        real(*args, shared=shared, late=not shared, **options)

    monkeypatch.setattr(attention_module, "launch_attend", divided)
    check(AttentionSpec(4, 2, 64, 16, HALF), [1] * 7, [210, 81, 199, 1, 129, 130, 100], TREE)


@pytest.mark.parametrize(
    ("cuts", "until", "pieces"),
    [(1, 1100, 3), (2, 1100, 4), (3, 9999, 6), (40, 9999, None), (1, 1099, None)],
)
def test_the_host_may_choose_the_pieces(
    monkeypatch: pytest.MonkeyPatch, cuts: int, until: int, pieces: int | None
) -> None:
    """40 pieces do not fit the buffers; longer parts than planned are cut as the device thinks best."""
    real = getattr(attention_module, "launch_schedule")  # noqa: B009 (not exported)

    def told(
        spec: AttentionSpec, tile: Any, lens: Any, lists: Any, *rest: Any, **options: int
    ) -> None:
        lists.part_base[2:] = torch.tensor([cuts, until])
        real(spec, tile, lens, lists, *rest, **options)

    monkeypatch.setattr(attention_module, "launch_schedule", told)
    kernels = check(AttentionSpec(4, 2, 128, 64, HALF), [1, 2, 1], [1100, 71, 513])
    found = int(kernels._sizes[0])
    assert found == pieces if pieces else 3 < found <= kernels._limits.items


def test_lengths_grow_on_the_device_between_updates() -> None:
    """What a CUDA graph replays: the host plans once, lengths and work list move on the device."""
    spec = AttentionSpec(4, 2, 64, 16, HALF)
    groups = [SharedPrefix(0, 32, (0, 1))]
    kernels = attention(spec)
    kernels.update([1, 1, 1], [33, 40, 5], groups)
    grown = random_batch(spec, [1, 1, 1], [129, 200, 101], groups)
    out = torch.full_like(grown.q, float("nan"))
    kernels.schedule(grown.lengths)
    kernels.run(grown.q, grown.k_cache, grown.v_cache, grown.block_table, grown.lengths, out)
    planned = torch.full_like(grown.q, float("nan"))
    kernels.update(grown.q_lens, grown.kv_lens, groups)
    kernels.schedule(grown.lengths)
    kernels.run(grown.q, grown.k_cache, grown.v_cache, grown.block_table, grown.lengths, planned)
    assert torch.equal(out, planned)


def test_a_padding_row_gives_zeros_with_and_without_sinks() -> None:
    for sinks in (False, True):
        check(AttentionSpec(4, 2, 64, 16, HALF, sinks=sinks), [1, 1], [0, 20])


def test_batches_without_queries() -> None:
    spec = AttentionSpec(4, 2, 64, 16, HALF)
    check(spec, [], [])
    check(spec, [0], [20])
    check(spec, [0, 2, 0], [20, 20, 0])


def test_a_small_workspace_means_fewer_pieces() -> None:
    spec = AttentionSpec(2, 1, 64, 16, HALF)
    kernels = check(spec, [1], [900], workspace=1, max_batch=1, max_rows=1)
    assert int(kernels._lists.merges[0]) == 1
    kernels = check(spec, [1], [900])
    assert int(kernels._lists.merges[0]) > 1


@st.composite
def ragged_trees(draw: st.DrawFn) -> Tree:
    """Sequences of 0 to 2 levels of shared blocks, then private keys, block edges included."""
    block = draw(st.sampled_from([16, 32]))
    batch = draw(st.integers(1, 5))
    roots = draw(st.lists(st.integers(0, 1), min_size=batch, max_size=batch))
    groups: list[SharedPrefix] = []
    reach = [0] * batch
    for root in (0, 1):
        rows = [row for row in range(batch) if roots[row] == root]
        size = draw(st.integers(0, 5)) * block
        if not rows or not size:
            continue
        groups.append(SharedPrefix(0, size, rows))
        below = draw(st.lists(st.sampled_from(rows), unique=True, max_size=3))
        more = size + draw(st.integers(1, 3)) * block
        groups += [SharedPrefix(size, more, below)] if below else []
        for row in rows:
            reach[row] = more if row in below else size
    new = draw(st.lists(st.integers(1, 4), min_size=batch, max_size=batch))
    tail = st.sampled_from([0, 1, block - 1, block, block + 1, 70])
    total = [start + count + draw(tail) for start, count in zip(reach, new, strict=True)]
    return block, new, total, groups


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(ragged_trees(), st.sampled_from([(4, 1), (5, 1), (2, 2)]))
@example((16, [2, 1], [18, 17], [SharedPrefix(0, 16, [0, 1])]), (7, 1))
def test_any_ragged_tree(tree: Tree, heads: tuple[int, int]) -> None:
    block, new, total, groups = tree
    check(AttentionSpec(heads[0], heads[1], 64, block, HALF), new, total, groups)
