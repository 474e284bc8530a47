"""`PrefixAttention`: attention over a paged cache that reads shared prefixes once."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.accel.buffers import Mirror
from sagellm_ir.runtime.accel.division import Private
from sagellm_ir.runtime.accel.forest import Ints, SharedPrefix, plan_forest
from sagellm_ir.runtime.accel.gate import Gate, ceil_div
from sagellm_ir.runtime.accel.launch import (
    LOG2E,
    Lists,
    launch_attend,
    launch_merge,
    launch_schedule,
)
from sagellm_ir.runtime.accel.spec import AttentionSpec, unsupported
from sagellm_ir.runtime.accel.tensors import Tensors
from sagellm_ir.runtime.accel.tiles import Tile, tile_for
from sagellm_ir.runtime.accel.worklist import (
    CHUNK,
    ITEM_FIELDS,
    ROW_FIELDS,
    Limits,
    SharedWork,
    plan_shared,
)

__all__ = ["PrefixAttention", "Variant"]


@frozen
class Variant:
    """Which kernels a batch runs. CUDA graphs are keyed by it (and by the number of rows)."""

    private: int
    """Rows of the private kernel's tiles."""
    shared: int
    """Rows of the shared kernel's tiles; 0: nothing is shared and that kernel is not launched."""


class PrefixAttention:
    """The kernels of one model on one device, with their static buffers.

    Use, in this order:

    - `update` when the batch changes (other sequences, groups or `q_lens`): host work, one copy.
    - `schedule` once a forward: one small kernel reads the lengths on the device.
    - `run` once a layer: one to three kernels.

    `schedule` and `run` touch no host data and may be captured in a CUDA graph; a captured graph
    serves every later batch with the same `Variant`, rows and batch size. Between two `update`s
    lengths may grow; the pages of `groups` must stay.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        max_batch: int,
        max_rows: int,
        device: torch.device | str,
        gate: Gate | None = Gate(),  # noqa: B008 (frozen)
        workspace: int = 128 << 20,
    ) -> None:
        """Allocate the buffers.

        Args:
            spec: the attention's shape.
            max_batch: sequences of a batch, at most 4096.
            max_rows: query tokens of a batch.
            device: a CUDA device; the CPU under Triton's interpreter (`TRITON_INTERPRET=1`).
            gate: decides which groups are read once; None: all of them.
            workspace: bytes for the partial outputs of keys that are read in more than one piece.

        Raises:
            SageIRError: the kernels do not support the spec, or a size is out of range.
        """
        if why := unsupported(spec):
            raise SageIRError(Diagnostic(f"attention kernels: {why}"))
        if not 0 < max_batch <= 4096 or max_rows < max_batch:
            raise SageIRError(
                Diagnostic(
                    f"attention kernels: {max_batch} sequences of {max_rows} query tokens in all",
                    help="1 <= max_batch <= 4096 and max_rows >= max_batch",
                )
            )
        self.gate = gate
        self.device = torch.device(device)
        on_cuda = self.device.type == "cuda"
        generation = torch.cuda.get_device_capability(self.device)[0] if on_cuda else 0
        other = on_cuda and generation != 9
        self.spec = evolve(spec, hopper=False) if other else spec
        self.max_batch, self.max_rows = max_batch, max_rows
        self.variant = Variant(16, 0)
        self._sms = (
            torch.cuda.get_device_properties(self.device).multi_processor_count if on_cuda else 1
        )
        self._batch = self._rows = 0
        self._chain = generation >= 9
        """Whether a layer's kernels start before the one before them ends."""
        self._allocate(workspace)

    def _allocate(self, workspace: int) -> None:
        spec, batch, rows = self.spec, self.max_batch, self.max_rows
        items = ceil_div(rows * spec.group, 16) + batch + 8 * self._sms
        parts = max(workspace // (spec.kv_heads * (spec.head_dim + 1) * 4), rows * spec.group)
        listed, entries = 8 * rows, 64 * rows
        self._limits = Limits(self._sms, items, listed, entries, parts)
        always = {"q_start": batch + 1, "begin": batch, "shared_slots": batch, "part_base": 4}
        shared = {"sizes": 2, "items": items * ITEM_FIELDS, "rows": listed}
        tables = {"where_start": batch, "where": entries}
        self._meta = Mirror(always | {"row_seq": rows} | shared | tables, self.device)
        self._items = self._ints(items * ITEM_FIELDS)
        self._sizes = self._ints(2)
        get = self._meta.device
        self._lists = Lists(
            q_start=get("q_start"),
            begin=get("begin"),
            shared_slots=get("shared_slots"),
            part_base=get("part_base"),
            row_seq=get("row_seq"),
            rows=get("rows"),
            where_start=get("where_start"),
            where=get("where"),
            merges=self._ints(rows * ROW_FIELDS),
            taken=self._ints(2),
            partial=torch.empty(parts, spec.kv_heads, spec.head_dim, device=self.device),
            lse=torch.empty(parts, spec.kv_heads, device=self.device),
        )

    def _ints(self, size: int) -> Tensor:
        """A buffer that the schedule kernel fills."""
        return torch.zeros(size, dtype=torch.int32, device=self.device)

    def update(
        self,
        q_lens: Sequence[int] | Ints,
        kv_lens: Sequence[int] | Ints,
        groups: Sequence[SharedPrefix] = (),
        *,
        tile: int = 0,
    ) -> Variant:
        """Describe a batch.

        Args:
            q_lens: `[batch]` new tokens of each sequence (1: plain decode). Sequences lie one after
                another in `q`.
            kv_lens: `[batch]` tokens of each sequence in the cache, the new ones included; 0 for a
                padding row.
            groups: what the sequences share, see `SharedPrefix`.
            tile: rows of the shared kernel's tiles where a CUDA graph is to serve every batch of as
                many sequences: it is launched then even if nothing is shared. 0: as is best.

        Returns:
            The kernels that `run` will launch.

        Raises:
            SageIRError: the batch exceeds `max_batch` or `max_rows`, a length is negative or less
                than its new tokens, or a group breaks a rule of `SharedPrefix`.
        """
        new, total = np.asarray(q_lens, np.int32), np.asarray(kv_lens, np.int32)
        self._check(new, total)
        most = int(new.max(initial=1))
        gate = self.gate or Gate()
        if tile:
            gate = gate.of_height(tile)
        forest = plan_forest(self.spec, groups, new, total, gate if self.gate else None)
        starts = np.zeros(len(new) + 1, np.int32)
        np.cumsum(new, out=starts[1:])
        private = tile_for(self.spec, most * self.spec.group)
        alone = None
        if forest.nodes and not private.wide:
            alone = Private.of(self.spec, private, new, total - forest.private)
        work = plan_shared(self.spec, forest, starts, gate, self._limits, alone)
        nothing = np.zeros(0 if work else len(new), np.int32)
        one_each = int(starts[-1]) == len(new) and most == 1
        sequences = np.arange(len(new), dtype=np.int32)

        meta = self._meta
        meta.wait()
        meta.write("q_start", starts)
        meta.write("begin", forest.private if work else nothing)
        meta.write("shared_slots", work.slots if work else nothing)
        meta.write("row_seq", sequences if one_each else np.repeat(sequences, new))
        meta.write("part_base", np.array(self._of_private(work, private, alone), np.int32))
        if work:
            meta.write("sizes", np.array([len(work.items), work.programs], np.int32))
            meta.write("items", work.items.reshape(-1))
            meta.write("rows", work.rows)
            meta.write("where_start", work.where_start)
            meta.write("where", work.where)
            meta.upload("where", len(work.where))
        else:
            meta.write("sizes", np.zeros(2, np.int32))
            meta.upload("sizes" if tile else "row_seq", None if tile else int(starts[-1]))
        self._batch, self._rows = len(new), int(starts[-1])
        self.variant = Variant(private.rows, work.tile_rows if work else tile)
        return self.variant

    def _of_private(
        self, work: SharedWork | None, tile: Tile, parts: Private | None
    ) -> tuple[int, ...]:
        """`Lists.part_base`."""
        grid = self._sms * tile.ctas
        if work is None:
            return 0, grid, 0, 0
        # Few SMs need more pieces than programs: the others take some of them in the end.
        programs = max(work.left * tile.ctas, self._sms) if work.left else grid
        # Parts that have grown by much are cut as the device thinks best.
        until = parts.longest * 3 // 2 + CHUNK if parts else 0
        return work.parts, programs, work.private_cuts, until

    def poison(self) -> None:
        """Fill the workspace with NaN: a result that reads what nobody wrote shows."""
        self._lists.partial.fill_(math.nan)
        self._lists.lse.fill_(math.nan)

    def _check(self, new: Ints, total: Ints) -> None:
        if new.shape != total.shape or new.ndim != 1:
            problem = f"{new.shape} query lengths for {total.shape} KV lengths"
        elif len(new) > self.max_batch or new.sum() > self.max_rows:
            problem = (
                f"{len(new)} sequences with {new.sum()} query tokens exceed "
                f"{self.max_batch} and {self.max_rows}"
            )
        elif len(new) and (new.min() < 0 or ((total < new) & (total != 0)).any()):
            problem = "a length is negative or less than the sequence's new tokens"
        else:
            return
        raise SageIRError(Diagnostic(f"attention batch: {problem}"))

    def schedule(self, kv_lens: Tensor) -> None:
        """Build the private work list from the lengths on the device.

        Args:
            kv_lens: int32 `[>= batch]`, contiguous: as for `update`, grown since by the tokens that
                were decoded.
        """
        if not self._batch:
            return
        launch_schedule(
            self.spec,
            tile_for(self.spec, self.variant.private),
            kv_lens,
            self._lists,
            self._items,
            self._sizes,
            max_batch=self.max_batch,
            batch=self._batch,
        )

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        kv_lens: Tensor,
        out: Tensor,
        *,
        k_scales: Tensor | None = None,
        v_scales: Tensor | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One layer's attention; the new tokens' keys and values must be in the cache.

        Args:
            q: `[rows, heads, head_dim]` in `spec.dtype`, any row and head strides. Row `t` of
                sequence `i` has position `kv_lens[i] - q_lens[i] + t` and sees all keys up to it.
            k_cache: `[blocks, block_size, kv_heads, head_dim]` in `spec.cache_dtype`, the last
                dimension contiguous, other strides free.
            v_cache: like `k_cache`.
            block_table: int32 `[batch, pages]`, rows any stride apart: page `j` of a sequence holds
                its tokens from `j * block_size` on. Entries behind its last page are not read.
            kv_lens: the tensor given to `schedule`.
            out: like `q`; overwritten. Rows without keys become zero.
            k_scales: for `int8`: `[blocks, block_size, kv_heads, 2]`, scale and zero point.
            v_scales: like `k_scales`.
            k_scale: for `fp8`: factor of all keys.
            v_scale: for `fp8`: factor of all values.
            sinks: `[heads]` logits, iff `spec.sinks`.

        Returns:
            `out`.

        Raises:
            SageIRError: a tensor has the wrong shape, type or strides, or is not for this cache.
        """
        spec = self.spec
        x = Tensors(
            *(q, k_cache, v_cache, block_table, kv_lens, out, k_scales, v_scales, sinks),
            spec.score_scale * LOG2E * k_scale,
            v_scale,
        )
        x.check(spec, self._rows, self._batch)
        if spec.kv != "fp8" and (k_scale, v_scale) != (1.0, 1.0):
            raise SageIRError(Diagnostic("attention: k_scale and v_scale are for an fp8 cache"))
        if not self._rows:
            return out
        shared = self.variant.shared > 0
        if shared:
            self._launch(x, shared=True)
        # Beside the shared kernel: the one is bound by arithmetic, the other by memory.
        self._launch(x, shared=False, beside=shared and self._chain)
        launch_merge(spec, x, self._lists, shared=shared, early=self._chain)
        return out

    def _launch(self, x: Tensors, *, shared: bool, beside: bool = False) -> None:
        tile = tile_for(self.spec, self.variant.shared if shared else self.variant.private)
        items, sizes = self._items, self._sizes
        if shared:
            items, sizes = self._meta.device("items"), self._meta.device("sizes")
        launch_attend(
            *(self.spec, tile, self._sms * tile.ctas, x, self._lists, items, sizes),
            shared=shared,
            early=self._chain,
            beside=beside,
            late=beside and tile_for(self.spec, self.variant.shared).wide,
        )
