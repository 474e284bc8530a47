"""The rows of a forward as vLLM's `SchedulerOutput`."""

from collections.abc import Collection, Iterable, Sequence

from attrs import evolve
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import PrefixGroup
from sagellm_ir.runtime.engines.vllm.blocks import BlockLedger, to_engine
from sagellm_ir.runtime.engines.vllm.connector import PlanMoves
from sagellm_ir.runtime.engines.vllm.copier import Copy
from sagellm_ir.runtime.engines.vllm.sequences import Row
from sagellm_ir.runtime.engines.vllm.versions import make
from sagellm_ir.target import Target

__all__ = ["check_rows", "common_blocks", "goes_on", "scheduler_output", "shared_by"]


def scheduler_output(
    rows: Sequence[Row],
    ledger: BlockLedger,
    copies: Sequence[Copy],
    finished: set[str],
    common: int,
    groups: Sequence[PrefixGroup],
    before: Collection[str],
) -> SchedulerOutput:
    """What the workers are told.

    Args:
        rows: of this forward; may be none.
        ledger: has the rows' tables.
        copies: of blocks, before the forward.
        finished: requests that the workers may forget.
        common: leading blocks that all rows share.
        groups: see `shared_by`.
        before: vLLM's ids of the requests in the forward before.
    """
    new: list[NewRequestData] = []
    cached = CachedRequestData.make_empty()
    for row in rows:
        sequence = row.sequence
        table = ledger.tables[sequence.name]
        sequence.request.num_computed_tokens = row.start
        if sequence.sent is None:
            new.append(NewRequestData.from_request(sequence.request, (to_engine(table),)))
        else:
            _go_on(cached, row, ledger, before)
        sequence.sent = len(table)
        ledger.changed.discard(sequence.name)
    counts = {row.sequence.request.request_id: row.stop - row.start for row in rows}
    return make(
        SchedulerOutput,
        optional={
            # Without it a release that has the field runs the copies after the forward.
            "has_sync_kv_loads": bool(copies),
            "num_common_prefix_blocks": [common],
        },
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=finished,
        free_encoder_mm_hashes=[],
        kv_connector_metadata=PlanMoves(copies, groups),
    )


def goes_on(row: Row, ledger: BlockLedger, before: Collection[str]) -> bool:
    """Whether the workers go on with what they know of a row, which may be a token that is not here yet."""
    return row.sequence.request.request_id in before and not _anew(row, ledger)


def _anew(row: Row, ledger: BlockLedger) -> bool:
    """Whether the workers need a row's tokens and table again: its table has changed, or its answer's
    tokens are computed again, which asynchronous workers have not kept."""
    again = row.stop - row.start > 1 and row.stop > row.sequence.request.num_prompt_tokens
    return again or row.sequence.name in ledger.changed


def _go_on(
    cached: CachedRequestData, row: Row, ledger: BlockLedger, before: Collection[str]
) -> None:
    """Add a request that the workers know: what is new of it, or all."""
    sequence, request = row.sequence, row.sequence.request
    name, anew = request.request_id, _anew(row, ledger)
    cached.req_ids.append(name)
    cached.num_computed_tokens.append(row.start)
    cached.num_output_tokens.append(sequence.answered)
    if anew:  # "Resumed" means to the workers: replace the table.
        cached.resumed_req_ids.add(name)
    added = to_engine(ledger.tables[sequence.name][0 if anew else sequence.sent :])
    cached.new_block_ids.append((added,) if anew or added else None)
    if anew or name not in before:
        cached.all_token_ids[name] = list(request.all_token_ids)


def check_rows(rows: Sequence[Row], ledger: BlockLedger, target: Target) -> None:
    """Refuse a forward in which vLLM's worker would crash, or read what is not there.

    Raises:
        SageIRError: what is wrong with it.
    """
    for row in rows:
        if not 0 <= row.start < row.stop <= row.sequence.known:
            raise SageIRError(
                Diagnostic(
                    f"the plan runs tokens [{row.start}, {row.stop}) of request "
                    f"{row.sequence.name!r}, which has {row.sequence.known}"
                )
            )
        ledger.table(row.sequence.name, row.stop)
    tokens = sum(row.stop - row.start for row in rows)
    problem = ""
    if len({row.sequence.name for row in rows}) != len(rows):
        problem = "a request stands in it twice"
    elif len(rows) > target.max_batch:
        problem = f"it has {len(rows)} rows; vLLM was made for {target.max_batch}"
    elif tokens > target.max_tokens:
        problem = f"it has {tokens} tokens; vLLM was made for {target.max_tokens}"
    if problem:
        raise SageIRError(
            Diagnostic(
                f"the plan's step cannot run: {problem}",
                help="compile the plan for this engine's target",
            )
        )


def common_blocks(groups: Iterable[PrefixGroup], rows: Sequence[Row], block_size: int) -> int:
    """Leading blocks of a prefix that all rows have behind them: what vLLM can use of groups."""
    names = {row.sequence.name for row in rows}
    if len(names) < 2:
        return 0
    stop = 0
    for group in sorted(groups, key=lambda group: group.start):
        if group.start <= stop < group.stop and names <= set(group.requests):
            stop = group.stop
    return min(stop, *(row.start for row in rows)) // block_size


def shared_by(
    groups: Iterable[PrefixGroup], rows: Sequence[Row], ledger: BlockLedger
) -> list[PrefixGroup]:
    """A step's groups of the rows of a forward that have one new token, by vLLM's ids.

    Raises:
        SageIRError: their tables differ; attention would read the blocks of one row for another.
    """
    ones = [row.sequence for row in rows if row.stop - row.start == 1]
    names = {sequence.name: sequence.request.request_id for sequence in ones}
    found = []
    for group in groups:
        here = [request for request in group.requests if request in names]
        if len(here) < 2:
            continue
        if not ledger.agree(group.start, group.stop, here):
            raise SageIRError(
                Diagnostic(
                    f"the plan says that {here[0]!r} and {len(here) - 1} more requests share tokens "
                    f"[{group.start}, {group.stop}), but their blocks differ"
                )
            )
        found.append(evolve(group, requests=tuple(names[request] for request in here)))
    return found
