"""Other attention kernels on the same batch. Each is used if it can be imported.

A peer is a function from a `Batch` to work that fills and returns an output; it raises
`Unsuitable` for batches it cannot serve. Planning stays outside of the timed work, as with ours.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagellm_ir.runtime.accel.selfcheck import Batch
from sagellm_ir.runtime.accel.spec import AttentionSpec

__all__ = ["PEERS", "Unsuitable"]

Work = Callable[[], Tensor]


class Unsuitable(Exception):
    """The peer does not serve this batch."""


def _starts(lengths: list[int], device: torch.device | str = "cuda") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def lmdeploy(spec: AttentionSpec, batch: Batch) -> Work:
    """LMDeploy's own path: split-K decode; else flatten the whole KV, then flash attention."""
    kernels = importlib.import_module("lmdeploy.pytorch.kernels.cuda")
    out, device = torch.empty_like(batch.q), batch.q.device
    args: dict[str, Any] = {"sm_scale": spec.score_scale}
    # Its kernels are compiled anew for strides that are multiples of 16; an engine's are.
    pages = batch.block_table.shape[1]
    table = torch.nn.functional.pad(batch.block_table, (0, -pages % 16))
    if max(batch.q_lens) == 1:
        if len(batch.q_lens) == spec.kv_heads == 1:
            raise Unsuitable("its sum over 128 splits reads outside of its buffer")

        def decode() -> Tensor:
            kernels.paged_attention_fwd(
                *(batch.q, batch.k_cache, batch.v_cache, out, table),
                kv_seqlens=batch.lengths,
                **args,
            )
            return out

        return decode
    if sum(batch.kv_lens) * spec.kv_heads * spec.head_dim >= 1 << 31:
        raise Unsuitable("it counts the elements of the flat cache in 32 bits")
    q_lens = torch.tensor(batch.q_lens, dtype=torch.int32, device=device)
    q_starts, kv_starts = (_starts(x, device)[:-1] for x in (batch.q_lens, batch.kv_lens))
    size = -(-sum(batch.kv_lens) // spec.block_size) * spec.block_size + spec.block_size

    def extend() -> Tensor:
        k, v = kernels.flatten_kv_cache(
            *(batch.k_cache, batch.v_cache, batch.lengths, table),
            start_loc=kv_starts,
            out_size=size,
            out_dtype=spec.dtype,
        )
        kernels.flash_attention_fwd(
            *(batch.q, k, v, out),
            q_start_loc=q_starts,
            q_seqlens=q_lens,
            kv_start_loc=kv_starts,
            kv_seqlens=batch.lengths,
            max_seqlen=max(batch.q_lens),
            **args,
        )
        return out

    return extend


def _flash3() -> Callable[..., Any]:
    """FlashAttention-3's paged variable-length forward, as vLLM packages it."""
    module = importlib.import_module("vllm.vllm_flash_attn")

    def call(q: Tensor, batch: Batch, table: Tensor, **args: Any) -> Any:
        return module.flash_attn_varlen_func(
            *(q, batch.k_cache, batch.v_cache), block_table=table, fa_version=3, **args
        )

    return call


def flash3(spec: AttentionSpec, batch: Batch) -> Work:
    """FlashAttention-3 on every sequence."""
    call, starts = _flash3(), _starts(batch.q_lens)
    return lambda: call(
        *(batch.q, batch, batch.block_table),
        cu_seqlens_q=starts,
        max_seqlen_q=max(batch.q_lens),
        seqused_k=batch.lengths,
        max_seqlen_k=max(batch.kv_lens),
        softmax_scale=spec.score_scale,
        causal=True,
    )


def flash3_cascade(spec: AttentionSpec, batch: Batch) -> Work:
    """vLLM's recipe: the prefix as one sequence of all queries, the rest, a merge."""
    call, prefix = _flash3(), _root(batch)
    merge = importlib.import_module("vllm.v1.attention.ops.merge_attn_states").merge_attn_states
    rows, starts = len(batch.q), _starts(batch.q_lens)
    pages = batch.block_table[:, prefix // spec.block_size :].contiguous()
    whole = _starts([rows])
    length = torch.tensor([prefix], dtype=torch.int32, device="cuda")
    rest = batch.lengths - prefix
    common = {"softmax_scale": spec.score_scale, "return_softmax_lse": True}
    out = torch.empty_like(batch.q)

    def work() -> Tensor:
        a, a_lse = call(
            *(batch.q, batch, batch.block_table[:1]),
            cu_seqlens_q=whole,
            max_seqlen_q=rows,
            seqused_k=length,
            max_seqlen_k=prefix,
            causal=False,
            **common,
        )
        b, b_lse = call(
            *(batch.q, batch, pages),
            cu_seqlens_q=starts,
            max_seqlen_q=max(batch.q_lens),
            seqused_k=rest,
            max_seqlen_k=max(batch.kv_lens) - prefix,
            causal=True,
            **common,
        )
        merge(out, a, a_lse, b, b_lse)
        return out

    return work


def _root(batch: Batch) -> int:
    """Length of the prefix of the whole batch."""
    for group in batch.groups:
        if group.start == 0 and len(group.rows) == len(batch.q_lens):
            return group.stop
    raise Unsuitable("no prefix of the whole batch")


def _paged(spec: AttentionSpec, batch: Batch, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's page lists, of the tokens from `first` on."""
    counts = [-(-(total - first) // spec.block_size) for total in batch.kv_lens]
    skip = first // spec.block_size
    pages = [batch.block_table[row, skip : skip + count] for row, count in enumerate(counts)]
    last = [(total - first - 1) % spec.block_size + 1 for total in batch.kv_lens]
    return _starts(counts), torch.cat(pages), torch.tensor(last, dtype=torch.int32, device="cuda")


def flashinfer_decode(spec: AttentionSpec, batch: Batch) -> Work:
    """FlashInfer's batch decode on tensor cores."""
    if max(batch.q_lens) > 1:
        raise Unsuitable("decode only")
    flashinfer = importlib.import_module("flashinfer")
    space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    wrapper.plan(
        *_paged(spec, batch, 0),
        *(spec.heads, spec.kv_heads, spec.head_dim, spec.block_size),
        q_data_type=spec.dtype,
        kv_data_type=spec.dtype,
    )
    return lambda: wrapper.run(batch.q, (batch.k_cache, batch.v_cache))


def flashinfer_cascade(spec: AttentionSpec, batch: Batch) -> Work:
    """FlashInfer's two-level cascade; `fa2` packs the heads of a group, its `fa3` does not."""
    prefix = _root(batch)
    flashinfer = importlib.import_module("flashinfer")
    space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, space, "NHD")
    for level in wrapper._batch_prefill_wrappers:
        level._backend = "fa2"
    pages = batch.block_table[0, : prefix // spec.block_size]
    full = torch.tensor([spec.block_size], dtype=torch.int32, device="cuda")
    lists = zip((_starts([len(pages)]), pages, full), _paged(spec, batch, prefix), strict=True)
    wrapper.plan(
        [_starts([len(batch.q)]), _starts(batch.q_lens)],
        *(list(pair) for pair in lists),
        *(spec.heads, spec.kv_heads, spec.head_dim, spec.block_size),
        causal=True,
        q_data_type=spec.dtype,
    )
    return lambda: wrapper.run(batch.q, (batch.k_cache, batch.v_cache))


def sdpa(spec: AttentionSpec, batch: Batch) -> Work:
    """torch's SDPA on contiguous copies made beforehand: no paging, equal lengths, one token."""
    if max(batch.q_lens) > 1 or len({*batch.kv_lens}) > 1 or sum(batch.kv_lens) > 1 << 18:
        raise Unsuitable("one new token, equal lengths, 256K tokens at most")
    total = batch.kv_lens[0]
    table = batch.block_table[:, : -(-total // spec.block_size)].long()

    def contiguous(cache: Tensor) -> Tensor:
        return cache[table].flatten(1, 2)[:, :total].transpose(1, 2).contiguous()

    k, v = contiguous(batch.k_cache), contiguous(batch.v_cache)
    q = batch.q[:, :, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, scale=spec.score_scale, enable_gqa=True)[:, :, 0]


PEERS: dict[str, Callable[[AttentionSpec, Batch], Work]] = {
    "lmdeploy": lmdeploy,
    "fa3": flash3,
    "fa3 cascade": flash3_cascade,
    "flashinfer": flashinfer_decode,
    "flashinfer cascade": flashinfer_cascade,
    "sdpa": sdpa,
}
