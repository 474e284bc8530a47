"""Defects of LMDeploy v0.11.0 that a plan could trip over: the stock fault, and the guard."""

from typing import Any

from sagellm_ir.lowering.plan import PlanStep, PrefillChunk
from sagellm_ir.runtime.backend import EngineView
from sagellm_ir.runtime.engines.lmdeploy.admission import Admission
from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager
from sagellm_ir.runtime.engines.lmdeploy.scheduler import PlanDriver
from tests.lmdeploy import recordings
from tests.lmdeploy.cpu import BLOCK, add, blocks_of, decode, prefill, scheduler, stop


class Silent:
    """A source with nothing to say: LMDeploy schedules."""

    def next_step(self, view: EngineView) -> PlanStep | None:
        return None


def whole(seq: Any) -> tuple[Any, PrefillChunk]:
    """A row that prefills all of a sequence."""
    return seq, PrefillChunk("r", 0, seq.num_all_ids)


def test_b1_a_match_is_not_appended_behind_blocks_a_sequence_owns(stock: Any) -> None:
    fault = stock["faults"]["b1"]
    assert fault["table"] == [
        *fault["owned"],
        *fault["right"][2:4],
    ]  # tokens 32.. in the fourth block
    assert fault["history"] == 4 * BLOCK
    guarded = recordings.b1_table(KVManager)
    assert guarded["table"] == guarded["owned"]
    assert guarded["history"] <= len(guarded["owned"]) * BLOCK


def test_b3_the_last_use_clock_tells_blocks_apart(stock: Any) -> None:
    assert stock["faults"]["b3"]["whole_seconds"]
    first, second = recordings.b3_clock(KVManager)["times"]
    assert first < second


def test_b3_the_least_recently_used_prefix_goes_first() -> None:
    sched = scheduler(blocks=32)
    KVManager(sched)
    leaves = []
    for session in range(6):
        seq = add(sched, session, [session] * (BLOCK + 2))
        prefill(sched)
        decode(sched)
        leaves.append(blocks_of(seq)[0])
        sched.end_session(session)
    order: list[int] = []
    sched.block_manager.eviction_cb = lambda kind, blocks, seq: order.extend(blocks.tolist())
    for _ in leaves:
        sched.block_trie.evict(1)
    assert order == leaves


def test_b4_a_sequence_that_was_not_admitted_holds_nothing(stock: Any) -> None:
    assert stock["faults"]["b4"] == {"admitted": 0, "blocks": 3, "history": 48}
    sched = recordings.b4_scheduler()
    kv = KVManager(sched)
    counts = sched.block_manager.allocator._log_mem.ref_count.copy()
    [waiting] = sched.waiting
    assert Admission(kv).prefill([whole(waiting)]) == []
    assert (waiting.num_blocks, waiting.num_history_ids) == (0, 0)
    assert waiting.num_token_ids == 7 * BLOCK
    assert (sched.block_manager.allocator._log_mem.ref_count == counts).all()


def test_b5_the_budget_counts_what_is_computed(stock: Any) -> None:
    assert stock["faults"]["b5"] == {"admitted": 4}
    sched = recordings.b5_scheduler()
    kv = KVManager(sched)
    admitted = Admission(kv).prefill(whole(seq) for seq in sched.waiting)
    assert [seq.num_token_ids for seq in admitted] == [8] * 6


def test_b6_the_client_of_an_aborted_sequence_is_told(stock: Any) -> None:
    assert stock["faults"]["b6"] == {"answer": "nothing", "aborted": 1}
    guarded = recordings.b6_answer(lambda eng: PlanDriver(eng, Silent()))
    assert guarded["aborted"] == 0
    assert (
        guarded["answer"] == 17
    )  # the prefill's token and one decode step; 128 tokens fit the pool


def test_host_blocks_come_back_before_a_table_can_name_them() -> None:
    sched = scheduler(blocks=16, host=16)
    kv = KVManager(sched)
    first = add(sched, 1, list(range(4 * BLOCK + 6)))
    prefill(sched)
    decode(sched)
    stop(first)
    shared = blocks_of(first)[:4]
    sched.end_session(1)
    assert kv.spill(shared)
    second = add(sched, 2, list(range(4 * BLOCK + 6)))
    output = sched.schedule(True)
    assert output.running == [second]
    assert blocks_of(second)[:4] == shared
    assert second.num_token_ids == 6
    assert (sched.block_manager.get_block_table(second) < 16).all()
    assert len(output.swap_in_map) == 4 == len(output.swap_out_map)


def test_host_blocks_without_room_on_the_device_are_not_fetched() -> None:
    sched = scheduler(blocks=10, host=16)
    kv = KVManager(sched)
    first = add(sched, 1, list(range(4 * BLOCK + 6)))
    prefill(sched)
    decode(sched)
    shared = blocks_of(first)[:4]
    sched.end_session(1)
    assert kv.spill(shared)
    add(sched, 2, [7] * (9 * BLOCK + 3))
    prefill(sched)
    assert sched.block_manager.get_num_free_gpu_blocks() == 0
    third = add(sched, 3, list(range(4 * BLOCK + 6)))
    sched.block_trie.match(third)
    assert blocks_of(third) == []


def test_a_row_that_needs_no_more_blocks_has_its_own_on_the_device() -> None:
    sched = scheduler(blocks=8, host=8)
    kv, seq = KVManager(sched), add(sched, 1, list(range(2 * BLOCK)))
    sched.block_manager.allocate(seq, 0)
    assert kv.spill(blocks_of(seq))
    assert Admission(kv).prefill([whole(seq)]) == [seq]
    assert all(map(kv.on_device, blocks_of(seq)))
