"""Paged attention against dense attention, on random tables, spans and groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sagellm_ir.runtime.engines.embedded import attention, ops
from sagellm_ir.runtime.engines.embedded.attention import (
    Row,
    SharedSpan,
    paged_attention,
    plan_parts,
)
from sagellm_ir.runtime.engines.embedded.pages import NativePages
from sagellm_ir.runtime.engines.embedded.pool import BlockTable

BLOCK, BLOCKS, HEADS, KV_HEADS, WIDTH = 4, 96, 6, 2, 8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_call_equals_the_plain_one(causal: bool, masked: bool) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8)
    value = torch.randn(2, 2, 5, 8)
    mask = torch.zeros(2, 1, 1, 5).index_fill_(3, torch.tensor([4]), float("-inf"))
    asked = (query, key, value, causal, mask if masked else None)
    for fast, plain in zip(ops.attend(*asked), ops.attend_plain(*asked), strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_products_equal_plain_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, other = (torch.randn(s).to(dtype) for s in ((3, 8), (5, 8), (3, 5)))
    bias = torch.randn(5).to(dtype)
    product = x.float() @ weight.float().T
    for found, expected in (
        (ops.linear(x, weight, bias), product + bias.float()),
        (ops.linear_silu(x, weight), torch.nn.functional.silu(product)),
        (ops.linear_mul(x, weight, other), product * other.float()),
        (ops.linear_add(x, weight, other), product + other.float()),
    ):
        torch.testing.assert_close(found, expected.to(dtype), rtol=2e-2, atol=2e-2)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Row], list[SharedSpan]]:
    """Rows with tables of mixed runs; some rows share their first blocks as a group."""
    rows: list[Row] = []
    first = 0
    free = draw(st.permutations(range(BLOCKS)))
    if draw(st.booleans()):
        free = sorted(free)
    shared_blocks, free = free[:3], free[3:]
    members = []
    for number in range(draw(st.integers(1, 5))):
        is_member = draw(st.booleans())
        decode = draw(st.booleans())
        context = draw(st.integers(3 * BLOCK if is_member else decode, 40))
        count = 1 if decode else draw(st.integers(1, 9))
        table = BlockTable(BLOCK)
        need = -(-(context + count) // BLOCK)
        own = need - 3 if is_member else need
        table.bind(0, ([*shared_blocks] if is_member else []) + list(free[:own]))
        free = free[own:]
        rows.append(Row(first, count, context + decode * is_member, table, decode))
        first += count
        if is_member:
            members.append(number)
    groups = [SharedSpan(0, 2 * BLOCK, tuple(members))]
    if len(members) > 2:
        groups.append(SharedSpan(2 * BLOCK, 3 * BLOCK, tuple(members[1:])))
    return rows, groups if len(members) > 1 else []


def dense(row: Row, query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
    """One row's answer from its KV laid out in full, with a mask."""
    size = row.context
    slots = [row.table.slot(i) for i in range(size)]
    new = slice(row.first, row.first + row.count)
    keys, values = cache[0][:, slots], cache[1][:, slots]
    mask = None
    if not row.decode:
        keys = torch.cat([keys, key[new].transpose(0, 1)], 1)
        values = torch.cat([values, value[new].transpose(0, 1)], 1)
        future = torch.ones(row.count, size + row.count, dtype=torch.bool).triu(size + 1)
        mask = torch.zeros(future.shape).masked_fill(future, float("-inf"))
    asked = query[new].transpose(0, 1)[None]
    out, _ = ops.attend_plain(asked, keys[None], values[None], False, mask)
    return out[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("limits", [(0, 0), (16, 16), (10**6, 0), (10**6, 10**6)])
@settings(max_examples=40, deadline=None)
@given(batch=batches(), seed=st.integers(0, 99))
def test_paged_equals_dense(
    limits: tuple[int, int], batch: tuple[list[Row], list[SharedSpan]], seed: int
) -> None:
    rows, groups = batch
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(row.count for row in rows)
    query = torch.randn(tokens, HEADS, WIDTH, generator=generator)
    key, value = torch.randn(2, tokens, KV_HEADS, WIDTH, generator=generator)
    cache = torch.randn(2, KV_HEADS, BLOCKS * BLOCK, WIDTH, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "VIEW_TOKENS", limits[0])
        patch.setattr(attention, "SHARE_TOKENS", limits[1])
        patch.setattr(attention, "TILE_ROWS", 3 if seed % 2 else 100)
        parts = plan_parts(rows, groups, BLOCKS * BLOCK, torch.device("cpu"))
    found = paged_attention(query, key, value, NativePages(cache), parts)
    expected = torch.cat([dense(row, query, key, value, cache) for row in rows])
    torch.testing.assert_close(found, expected)


def decode_rows(*tables: tuple[int, ...]) -> list[Row]:
    """One decode row a table, each reading all of it."""
    rows = []
    for first, blocks in enumerate(tables):
        table = BlockTable(256)
        table.bind(0, blocks)
        rows.append(Row(first, 1, table.capacity, table, True))
    return rows


def test_equally_spaced_rows_are_one_call_in_place() -> None:
    parts = plan_parts(decode_rows((0, 1), (4, 5), (8, 9)), [], 4096, torch.device("cpu"))
    assert [(part.spans, part.rows) for part in parts] == [((0, 1024, 3, 512), slice(0, 3))]


def test_a_shared_prefix_is_read_once() -> None:
    rows = decode_rows((0, 1, 2, 3), (0, 1, 2, 5), (0, 1, 2, 7))
    parts = plan_parts(rows, [SharedSpan(0, 768, (0, 1, 2))], 4096, torch.device("cpu"))
    assert [(p.spans, p.shared, p.first) for p in parts] == [
        ((0, 0, 1, 768), True, True),
        ((768, 512, 3, 256), False, False),
    ]
