"""What LMDeploy runs, in the one format of traces (`runtime/trace.py`)."""

from collections.abc import Iterator, Mapping
from typing import Any

from sagellm_ir.lowering.plan import KVMove
from sagellm_ir.runtime.engines.lmdeploy.view import WORKER, Names
from sagellm_ir.runtime.trace import Trace, TraceRow
from sagellm_ir.target import DEVICE, HOST

__all__ = ["record"]


def record(
    trace: Trace, names: Names, manager: Any, output: Any, is_prefill: bool, pending: int = 0
) -> None:
    """Note a scheduling decision: its swaps, then its forwards.

    A row whose answer ends inside a decode decision runs on, and what it makes is thrown away: that
    is left out.

    Args:
        trace: what is added to.
        names: of requests.
        manager: LMDeploy's block manager.
        output: the decision, before its sequences are locked.
        is_prefill: whether it prefills.
        pending: tokens of each row that a forward in flight is still to give.
    """
    for swaps, origin, to in (
        (output.swap_out_map, DEVICE, HOST),
        (output.swap_in_map, HOST, DEVICE),
    ):
        if swaps:
            trace.moved(WORKER, _move(swaps, origin, to))
    tables = [manager.get_block_table(seq).tolist() for seq in output.running]
    rows = list(zip(output.running, tables, strict=True))
    for forward in range(1 if is_prefill else output.loop_count):
        trace.ran(WORKER, _rows(trace, names, rows, pending + forward, is_prefill))


def _move(swaps: Mapping[int, int], origin: str, to: str) -> KVMove:
    return KVMove(origin, to, tuple(map(int, swaps)), tuple(map(int, swaps.values())))


def _rows(
    trace: Trace, names: Names, rows: list[tuple[Any, list[int]]], forward: int, is_prefill: bool
) -> Iterator[TraceRow]:
    for seq, table in rows:
        start = int(seq.num_history_ids) + forward
        stop = start + int(seq.num_token_ids)
        if is_prefill or seq.num_new_tokens + forward < seq.sampling_param.max_new_tokens:
            blocks = trace.cut(table, stop)
            yield TraceRow(names.request(seq), start, stop, not is_prefill, blocks)
