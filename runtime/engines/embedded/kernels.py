"""Attention of a forward by the Triton kernels of `runtime.accel`, on a GPU that has them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sagellm_ir.runtime.accel import AccelConfig, AttentionSpec, SharedPrefix, make_attention
from sagellm_ir.runtime.engines.embedded.attention import Row, SharedSpan
from sagellm_ir.runtime.engines.embedded.model_config import ModelConfig
from sagellm_ir.runtime.engines.embedded.pages import NativePages, Pages
from sagellm_ir.runtime.engines.embedded.pool import KVPool
from sagellm_ir.target import Target

if TYPE_CHECKING:  # Imports triton.
    from sagellm_ir.runtime.accel.attention import PrefixAttention

__all__ = ["Attend", "KernelAttention", "kernel_attention"]

Attend = Callable[[Tensor, Tensor, Tensor, Pages], Tensor]
"""Attention of one layer, see `paged_attention`."""


def kernel_attention(
    config: AccelConfig, model: ModelConfig, dtype: torch.dtype, target: Target, pool: KVPool
) -> "KernelAttention | None":
    """The kernels for a pool; None on a CPU, for coded pages, and as `make_attention` says."""
    pages = pool.layers[0]
    if not isinstance(pages, NativePages) or pages.values.device.type != "cuda":
        return None
    spec = AttentionSpec(
        model.heads, model.kv_heads, model.head_dim, block_size=pool.block_size, dtype=dtype
    )
    kernels = make_attention(
        config,
        spec,
        max_batch=min(target.max_batch, 4096),
        max_rows=target.max_tokens + target.max_batch,
        device=pages.values.device,
    )
    return None if kernels is None else KernelAttention(kernels)


class KernelAttention:
    """What `plan_parts` and `paged_attention` do, in one to three kernels a layer.

    Args:
        kernels: for the pool's block size, on its device.
    """

    def __init__(self, kernels: "PrefixAttention") -> None:
        self._kernels = kernels

    def plan(self, rows: Sequence[Row], shared: Sequence[SharedSpan]) -> Attend | None:
        """How the layers of a forward attend; None: it is larger than what the kernels are for.

        Args:
            rows: in batch order.
            shared: prefix groups.
        """
        kernels = self._kernels
        if len(rows) > kernels.max_batch or sum(row.count for row in rows) > kernels.max_rows:
            return None
        counts = np.array([row.count for row in rows], np.int32)
        lengths = np.array(
            [row.context + (0 if row.decode else row.count) for row in rows], np.int32
        )
        groups = [SharedPrefix(span.start, span.stop, span.rows) for span in shared if span.rows]
        kernels.update(counts, lengths, groups)
        spec, size = kernels.spec, kernels.spec.block_size
        held = -(-lengths // size)
        table = np.zeros((len(rows), int(held.max(initial=1))), np.int32)
        for at, row in enumerate(rows):
            table[at, : held[at]] = row.table.blocks[: held[at]]
        tables = torch.from_numpy(table).to(kernels.device)
        kv_lens = torch.from_numpy(lengths).to(kernels.device)
        kernels.schedule(kv_lens)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: Pages) -> Tensor:
            assert isinstance(layer, NativePages)
            # [2, kv_heads, slots, head_dim] -> [2, blocks, block_size, kv_heads, head_dim]
            pages = layer.values.view(*layer.values.shape[:2], -1, size, spec.head_dim)
            k, v = pages.permute(0, 2, 3, 1, 4).unbind(0)
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            return kernels.run(query, k, v, tables, kv_lens, out).flatten(1)

        return attend
