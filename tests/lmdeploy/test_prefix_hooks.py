"""Patch 0002: hooks on fetch and store, and insertion as soon as a prefill is issued."""

import asyncio
from typing import Any

import pytest

from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager
from tests.lmdeploy.cpu import (
    BLOCK,
    add,
    ask,
    blocks_of,
    decode,
    engine,
    next_turn,
    oracle,
    prefill,
    run,
    scheduler,
    stop,
)

PROMPT = list(range(4 * BLOCK))


class Recorder:
    """A hook that allows what it is told to, and writes down all calls."""

    def __init__(self, fetch: bool = True, store: bool = True, nodes: int = 99) -> None:
        self.fetch, self.store, self.nodes = fetch, store, nodes
        self.calls: list[tuple[Any, ...]] = []

    def before_fetch(self, seq: Any) -> bool:
        self.calls.append(("before_fetch", seq.session_id))
        return self.fetch

    def can_fetch(self, node: Any) -> bool:
        self.nodes -= 1
        return self.nodes >= 0

    def after_fetch(self, seq: Any, blocks: Any) -> None:
        self.calls.append(("after_fetch", seq.session_id, len(blocks)))

    def before_store(self, seq: Any) -> bool:
        self.calls.append(("before_store", seq.session_id))
        return self.store

    def after_store(self, seq: Any, blocks: Any, replaced: Any) -> None:
        self.calls.append(("after_store", seq.session_id, len(blocks), len(replaced)))


def hooked(hook: Any, **options: Any) -> Any:
    sched = scheduler(**options)
    sched.block_trie.hook = hook
    return sched


def test_hooks_see_fetch_and_store() -> None:
    hook = Recorder()
    sched = hooked(hook)
    for session in (1, 2):
        add(sched, session, [*PROMPT, session])
    prefill(sched)
    assert hook.calls == [
        ("before_fetch", 1),
        ("after_fetch", 1, 0),
        ("before_store", 1),
        ("after_store", 1, 4, 0),
        ("before_fetch", 2),
        ("after_fetch", 2, 4),
        ("before_store", 2),
    ]


@pytest.mark.parametrize(("hook", "matched"), [(Recorder(fetch=False), 0), (Recorder(nodes=3), 3)])
def test_hooks_can_refuse_or_shorten_a_fetch(hook: Recorder, matched: int) -> None:
    sched = hooked(hook)
    for session in (1, 2):
        add(sched, session, [*PROMPT, session])
    _, second = prefill(sched)
    assert second.num_blocks == 5
    assert len({*blocks_of(second)} & {*blocks_of(sched.running[0])}) == matched


def test_hooks_can_refuse_a_store() -> None:
    sched = hooked(Recorder(store=False))
    for session in (1, 2):
        add(sched, session, [*PROMPT, session])
    first, second = prefill(sched)
    decode(sched)
    assert not {*blocks_of(first)} & {*blocks_of(second)}
    assert not sched.block_trie.leaves


def burst(eng: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    async def work() -> Any:
        return await asyncio.gather(*[ask(eng, i, prompt, new) for i, prompt in enumerate(prompts)])

    return list(run(work))


def test_requests_that_arrive_together_share(stock: Any) -> None:
    """Stock computes the prefix for each; with the hook the first row writes what the others read."""
    _, trace = stock["engine"]["burst"]
    assert sum(sum(step["tokens"]) for step in trace if not step["decode"]) == 8 * 148
    eng = engine()
    KVManager(eng.scheduler)
    prompts = [list(range(100, 228)) + [i] * 20 for i in range(8)]
    assert burst(eng, prompts, 24) == [oracle(prompt, 24) for prompt in prompts]
    prefills = [step["tokens"] for step in eng.executor.trace if not step["decode"]]
    assert prefills == [[148, 20, 20, 20, 20, 20, 20, 20]]


def test_a_block_still_to_be_computed_replaces_none() -> None:
    """Equal prompts of whole blocks: the last block is computed by each, then held once."""
    eng = engine()
    KVManager(eng.scheduler)
    assert burst(eng, [PROMPT, PROMPT], 20) == [oracle(PROMPT, 20)] * 2
    prefill_step, first_decode = eng.executor.trace[:2]
    assert prefill_step["tokens"] == [64, 16]
    one, two = prefill_step["blocks"]
    assert one[:3] == two[:3]
    assert one[3] != two[3]
    one, two = first_decode["blocks"]
    assert one[:4] == two[:4]


def test_no_reference_is_lost_or_kept() -> None:
    sched = scheduler(blocks=64)
    KVManager(sched)
    for session in range(4):
        add(sched, session, [*PROMPT, session])
    seqs = prefill(sched)
    decode(sched)
    stop(*seqs)
    next_turn(seqs[0], [3] * 40)
    prefill(sched)
    decode(sched)
    for session in range(4):
        sched.end_session(session)
    counts = sched.block_manager.allocator._log_mem.ref_count
    assert set(counts.tolist()) == {0, 1}
    cached = int(counts.sum())
    assert sched.block_manager.get_num_free_gpu_blocks() == 64 - cached
    assert sched.block_trie.evict(1000) == cached
    assert sched.block_manager.get_num_free_gpu_blocks() == 64


def test_a_block_is_not_replaced_by_one_on_the_host_without_room() -> None:
    """The trie's copy of a block is on the host while a sequence computes the same block again."""
    sched = scheduler(blocks=9, host=8)
    kv = KVManager(sched)
    add(sched, 1, [*PROMPT, 1])
    prefill(sched)
    decode(sched)
    shared = blocks_of(sched.running[0])[:4]
    sched.end_session(1)
    assert kv.spill(shared)
    kv.can_fetch = lambda node: False  # type: ignore[method-assign]
    second = add(sched, 2, [*PROMPT, *[2] * (4 * BLOCK + 9)])
    prefill(sched)
    del kv.can_fetch
    assert sched.block_manager.get_num_free_gpu_blocks() == 0
    decode(sched)
    assert not {*shared} & {*blocks_of(second)}
    assert (sched.block_manager.get_block_table(second) < 9).all()
