"""From tensors to kernel launches: strides, constants, grids."""

import torch
from attrs import frozen
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sagellm_ir.runtime.accel import kernels
from sagellm_ir.runtime.accel.gate import ceil_div
from sagellm_ir.runtime.accel.spec import AttentionSpec
from sagellm_ir.runtime.accel.tensors import Tensors
from sagellm_ir.runtime.accel.tiles import Tile, without_roles
from sagellm_ir.runtime.accel.worklist import (
    CHUNK,
    CHUNKS,
    CUT_COST,
    FEW,
    ITEM_FIELDS,
    PART_COST,
    SLOT_COST,
    SLOWER,
    item_cost,
)

__all__ = [
    "LOG2E",
    "Lists",
    "attend_constants",
    "boxes",
    "has_boxes",
    "heads_of_merge",
    "launch_attend",
    "launch_merge",
    "launch_schedule",
    "merge_constants",
    "rows_of_merge",
    "schedule_constants",
    "stride_constants",
    "wide_constants",
]

LOG2E = 1.4426950408889634
_PROGRAMS = 8192
"""Programs of `merge` that fill a GPU."""
_MERGES = ((64, 4, 128, 32), (256, 1, 32, 32), (1024, 1, 16, 64), (1 << 62, 1, 8, 256))
"""Of up to so many heads of all rows: warps of a program of `merge`, partials that it takes at once,
and columns. Few heads have many partials and leave room: many at once, by several programs a head.
Many heads have few, and one warp each, so that more programs fit on an SM."""
_BOX = [1, kernels.PAGE.value, 1, kernels.SPAN.value]
_IN_BOX = NVMMASharedLayout(128, 16, rank=4)
"""How a box lies in shared memory: as `attend_wide` wants its tiles."""


def _padded(spec: AttentionSpec) -> int:
    """Columns of a tile: a power of two."""
    return 1 << (spec.head_dim - 1).bit_length()


def _interpreted() -> bool:
    return "Interpreted" in type(kernels.attend).__name__


@frozen(eq=False)
class Lists:
    """What a kernel works off, and the buffers that tie kernels together; int32 unless said."""

    q_start: Tensor
    begin: Tensor
    shared_slots: Tensor
    part_base: Tensor
    """The first partial of private parts; the programs that those are cut for; the pieces of the longest
    that the host wants (0: as many as `schedule` thinks best); and up to which length of it."""
    row_seq: Tensor
    rows: Tensor
    where_start: Tensor
    where: Tensor
    merges: Tensor
    """What `merge` knows of each query row, `ROW_FIELDS` each."""
    taken: Tensor
    """Items taken from the shared and from the private list, besides each program's first."""
    partial: Tensor
    """float32 `[parts, kv_heads, head_dim]`."""
    lse: Tensor
    """float32 `[parts, kv_heads]`, log2."""


def stride_constants(k: Tensor, v: Tensor, ks: Tensor, vs: Tensor) -> dict[str, object]:
    """Strides of the cache: the same for as long as an engine runs, so known when compiling."""
    return {
        f"{name}_{axis}_stride": tensor.stride(at)
        for name, tensor in (("k", k), ("v", v), ("ks", ks), ("vs", vs))
        for at, axis in enumerate(("page", "row", "head"))
    }


def attend_constants(
    spec: AttentionSpec,
    tile: Tile,
    *,
    shared: bool,
    early: bool,
    beside: bool,
    late: bool = False,
    upcast: bool = False,
) -> dict[str, object]:
    """The compile-time arguments of `attend`, but for those of `stride_constants`."""
    return {
        "SHARED": shared,
        "KV_HEADS": spec.kv_heads,
        "GROUP": spec.group,
        "D": spec.head_dim,
        "BLOCK": spec.block_size,
        "KV": spec.kv,
        "WINDOW": spec.window,
        "SOFTCAP": spec.softcap,
        "SINKS": spec.sinks,
        "UPCAST": upcast,
        "BM": tile.rows,
        "BN": tile.keys,
        "BD": _padded(spec),
        "EARLY": early,
        "BESIDE": beside,
        "LATE": late,
    }


def wide_constants(
    spec: AttentionSpec, tile: Tile, *, shared: bool, early: bool, beside: bool
) -> dict[str, object]:
    """The compile-time arguments of `attend_wide`."""
    return {
        "SHARED": shared,
        "KV_HEADS": spec.kv_heads,
        "GROUP": spec.group,
        "D": spec.head_dim,
        "BM": tile.rows,
        "BN": tile.keys,
        "STAGES": tile.stages,
        "EARLY": early,
        "BESIDE": beside,
    }


def boxes(cache: Tensor) -> TensorDescriptor:
    """What the copy engine needs to know of a cache, for boxes of 64 tokens and 64 columns of a head."""
    return TensorDescriptor(cache, [*cache.shape], [*cache.stride()], _BOX, _IN_BOX)


def has_boxes(cache: Tensor) -> bool:
    """Whether the copy engine can read a cache: address and strides are multiples of 16 bytes."""
    steps = (step * cache.itemsize for step in cache.stride()[:3])
    return not any(number % 16 for number in (cache.data_ptr(), *steps))


def launch_attend(
    spec: AttentionSpec,
    tile: Tile,
    grid: int,
    x: Tensors,
    lists: Lists,
    items: Tensor,
    sizes: Tensor,
    *,
    shared: bool,
    early: bool,
    beside: bool = False,
    late: bool = False,
) -> None:
    """Launch `attend` on a fixed grid of `grid` programs.

    Args:
        early: whether the launch behind it may start before it has ended (programmatic dependent
            launch), and waits for it by itself.
        beside: whether it may start so behind the launch before it; it does not end before that.
        late: whether many of its programs find no room until that launch has ended.
    """
    chain = {"early": early, "beside": beside}
    # Triton's interpreter has no bfloat16 or float8 arithmetic.
    upcast = _interpreted() and (spec.dtype is torch.bfloat16 or spec.kv == "fp8")
    if tile.wide and (_interpreted() or not (has_boxes(x.k) and has_boxes(x.v))):
        tile = without_roles(spec)
    if tile.wide:
        kernels.attend_wide[(grid,)](
            *(x.q, boxes(x.k), boxes(x.v), x.out, lists.partial, lists.lse),
            *(x.table, lists.rows, items, sizes),
            *(x.qk_scale, x.out_scale),
            *(x.q.stride()[:2] + x.out.stride()[:2]),
            x.table.stride(0),
            **wide_constants(spec, tile, shared=shared, **chain),
            num_warps=tile.warps,
            maxnreg=tile.registers,
            launch_pdl=beside,
        )
        return
    ks = x.k if x.k_scales is None else x.k_scales
    vs = x.v if x.v_scales is None else x.v_scales
    kernels.attend[(grid,)](
        *(x.q, x.k, x.v, ks, vs, x.out, lists.partial, lists.lse, x.sinks, x.table, x.kv_lens),
        *(lists.q_start, lists.row_seq, lists.rows, items, sizes),
        *(lists.taken if shared else lists.taken[1:], x.qk_scale, x.out_scale),
        *(x.q.stride()[:2] + x.out.stride()[:2]),
        x.table.stride(0),
        **stride_constants(x.k, x.v, ks, vs),
        **attend_constants(spec, tile, shared=shared, late=late, upcast=upcast, **chain),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.limit(spec, shared=shared),
        launch_pdl=beside,
    )


def merge_constants(spec: AttentionSpec, rows: int, *, shared: bool, early: bool) -> dict[str, int]:
    """The compile-time arguments of `merge`."""
    heads = rows * spec.heads
    warps, slots, width = next(how for most, *how in _MERGES if heads <= most)
    return {
        "EACH": heads_of_merge(spec, rows),
        "KV_HEADS": spec.kv_heads,
        "GROUP": spec.group,
        "D": spec.head_dim,
        "SHARED": shared,
        "SINKS": spec.sinks,
        "SLOTS": slots,
        "WIDTH": min(width, _padded(spec)),
        "EARLY": early,
        "num_warps": warps,
    }


def heads_of_merge(spec: AttentionSpec, rows: int) -> int:
    """Heads of one program: few programs suffice to fill a GPU, and each costs its start."""
    if rows * spec.heads <= _PROGRAMS:
        return 1
    return spec.group if rows * spec.kv_heads <= _PROGRAMS else spec.heads


def rows_of_merge(spec: AttentionSpec) -> tuple[int, ...]:
    """Query rows of batches that need, between them, every form of `merge`."""
    ends = [most // spec.heads for most, *_ in _MERGES[:-1]]
    ends += [_PROGRAMS // spec.heads, _PROGRAMS // spec.kv_heads]
    return tuple(dict.fromkeys((max(ends[0], 1), *(end + 1 for end in ends))))


def launch_merge(
    spec: AttentionSpec, x: Tensors, lists: Lists, *, shared: bool, early: bool
) -> None:
    """Launch `merge`: a program for each query row and some heads.

    Args:
        shared: whether the batch has partials from nodes.
        early: whether it may start before the kernel before it on the stream, `attend`, has ended
            (programmatic dependent launch).
    """
    constants = merge_constants(spec, len(x.q), shared=shared, early=early)
    heads = spec.heads // heads_of_merge(spec, len(x.q))
    kernels.merge[(len(x.q), heads, ceil_div(spec.head_dim, constants["WIDTH"]))](
        *(lists.partial, lists.lse, x.out, x.sinks, lists.merges, lists.where, lists.taken),
        *x.out.stride()[:2],
        **constants,
        launch_pdl=early,
    )


def schedule_constants(spec: AttentionSpec, tile: Tile, max_batch: int) -> dict[str, object]:
    """The compile-time arguments of `schedule`."""
    return {
        "KV_HEADS": spec.kv_heads,
        "GROUP": spec.group,
        "BM": tile.rows,
        "BLOCK": spec.block_size,
        "WINDOW": spec.window,
        "CHUNK": CHUNK,
        "CHUNKS": CHUNKS,
        "ITEM_COST": item_cost(tile),
        "FEW": FEW,
        "SLOWER": SLOWER,
        "CUT_COST": CUT_COST,
        "SLOT_COST": SLOT_COST,
        "PART_COST": PART_COST * tile.rows,
        "BATCH": 1 << (max_batch - 1).bit_length(),
    }


def launch_schedule(
    spec: AttentionSpec,
    tile: Tile,
    kv_lens: Tensor,
    lists: Lists,
    items: Tensor,
    sizes: Tensor,
    *,
    max_batch: int,
    batch: int,
) -> None:
    """Launch `schedule`: a program for each sequence."""
    kernels.schedule[(batch,)](
        *(kv_lens, lists.q_start, lists.begin, lists.shared_slots, lists.part_base),
        *(lists.where_start, lists.merges, items, sizes, lists.taken),
        *(batch, len(items) // ITEM_FIELDS, len(lists.lse)),
        **schedule_constants(spec, tile, max_batch),
    )
