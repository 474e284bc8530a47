"""The embedded engine's attention by kernels: the same as in torch, in Triton's interpreter."""

import torch

from sagellm_ir.runtime.accel.attention import PrefixAttention
from sagellm_ir.runtime.accel.spec import AttentionSpec
from sagellm_ir.runtime.engines.embedded.attention import (
    Row,
    SharedSpan,
    paged_attention,
    plan_parts,
)
from sagellm_ir.runtime.engines.embedded.kernels import KernelAttention
from sagellm_ir.runtime.engines.embedded.pages import NativePages
from sagellm_ir.runtime.engines.embedded.pool import BlockTable

BLOCK = 16
SPEC = AttentionSpec(6, 2, 64, BLOCK, torch.float16)


def table(*blocks: int) -> BlockTable:
    made = BlockTable(BLOCK)
    made.bind(0, blocks)
    return made


def batch() -> tuple[list[Row], list[SharedSpan]]:
    """A chunk that goes on after 32 cached tokens, a new prompt, and three decode rows."""
    rows = [
        Row(0, 7, 32, table(3, 1, 9), False),
        Row(7, 5, 0, table(12), False),
        Row(12, 1, 40, table(3, 1, 7), True),
        Row(13, 1, 33, table(3, 1, 2), True),
        Row(14, 1, 16, table(5), True),
    ]
    return rows, [SharedSpan(0, 32, (0, 2, 3))]


def kernels(max_rows: int = 64) -> KernelAttention:
    made = PrefixAttention(
        SPEC, max_batch=8, max_rows=max_rows, device="cpu", gate=None, workspace=1 << 20
    )
    return KernelAttention(made)


def test_kernels_attend_as_torch_does() -> None:
    torch.manual_seed(0)
    rows, shared = batch()
    pages = NativePages(torch.randn(2, 2, 16 * BLOCK, 64).half())
    query, key, value = (torch.randn(15, heads, 64).half() for heads in (6, 2, 2))
    slots = [row.table.slot(at) for row in rows for at in positions(row)]
    key, value = pages.write(torch.tensor(slots), key, value)
    attend = kernels().plan(rows, shared)
    assert attend is not None
    found = attend(query, key, value, pages)
    parts = plan_parts(rows, shared, 16 * BLOCK, torch.device("cpu"))
    expected = paged_attention(query, key, value, pages, parts)
    assert (found - expected).abs().max() < 5e-3


def positions(row: Row) -> range:
    """Of a row's new tokens."""
    end = row.context + (0 if row.decode else row.count)
    return range(end - row.count, end)


def test_a_batch_beyond_the_buffers_is_left_to_torch() -> None:
    rows, shared = batch()
    assert kernels(max_rows=8).plan(rows, shared) is None
