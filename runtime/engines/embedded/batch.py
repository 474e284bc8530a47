"""The rows of one forward as the tensors that a model takes."""

from functools import partial

import torch

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import PlanStep
from sagellm_ir.runtime.engines.embedded.attention import (
    Row,
    SharedSpan,
    paged_attention,
    plan_parts,
)
from sagellm_ir.runtime.engines.embedded.kernels import KernelAttention
from sagellm_ir.runtime.engines.embedded.model import Batch
from sagellm_ir.runtime.engines.embedded.work import Work
from sagellm_ir.runtime.engines.embedded.worker import WorkerMemory
from sagellm_ir.target import DEVICE

__all__ = ["make_batch"]


def make_batch(
    step: PlanStep,
    worker: WorkerMemory,
    work: list[Work],
    device: torch.device,
    kernels: KernelAttention | None,
) -> Batch:
    """Everything the layers share: ids, positions, slots, attention.

    Args:
        work: as `ordered` gives it.
        kernels: attend where there are any and the forward is not too large for them; else torch.

    Raises:
        SageIRError: a prefix group of the step names rows that do not hold the same blocks.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last: list[int] = []
    rows: list[Row] = []
    for item in work:
        table = worker.tables[item.sequence.request.id]
        context = item.stop if item.decode else item.start
        rows.append(Row(len(ids), item.stop - item.start, context, table, item.decode))
        ids += item.sequence.tokens[item.start : item.stop]
        positions += range(item.start, item.stop)
        for slot, count in table.spans(item.start, item.stop):
            slots += range(slot, slot + count)
        if item.yields:
            last.append(len(ids) - 1)
    shared = _shared(step, work, rows)
    attend = kernels.plan(rows, shared) if kernels else None
    if attend is None:
        held = worker.pool.capacity[DEVICE] * worker.pool.block_size
        attend = partial(paged_attention, parts=plan_parts(rows, shared, held, device))
    ints = [torch.tensor(v, dtype=torch.int64) for v in (ids, positions, slots, last)]
    moved = [tensor.to(device) for tensor in ints]
    return Batch(moved[0], moved[1], moved[2], attend, moved[3])


def _shared(step: PlanStep, work: list[Work], rows: list[Row]) -> list[SharedSpan]:
    """A step's prefix groups, by row; checked, since a wrong one reads another's KV."""
    place = {item.sequence.request.id: i for i, item in enumerate(work)}
    shared = []
    for group in step.groups:
        found = (place[name] for name in group.requests if name in place)
        # A chunk that is just computing these tokens reads them fresh.
        members = tuple(i for i in found if rows[i].context >= group.stop)
        spans = [rows[i].table.spans(group.start, group.stop) for i in members]
        if any(span != spans[0] for span in spans):
            raise SageIRError(
                Diagnostic(
                    f"step {step.index} groups requests {', '.join(group.requests)} on tokens "
                    f"[{group.start}, {group.stop}), but they do not hold the same blocks there"
                )
            )
        shared.append(SharedSpan(group.start, group.stop, members))
    return shared
