"""Random requests under random plans, sense and nonsense: no block leaks, no request is lost."""

import asyncio
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sagellm_ir.lowering.plan import Bind, KVFree, KVMove, PlanStep, PrefillChunk, PrefixGroup
from sagellm_ir.runtime.backend import EngineView
from sagellm_ir.runtime.engines.lmdeploy.online import OnlineSource, target_of
from sagellm_ir.runtime.engines.lmdeploy.scheduler import PlanDriver
from sagellm_ir.runtime.engines.lmdeploy.view import NamedSequences, Names
from sagellm_ir.runtime.planner import OnlinePlanner
from tests.lmdeploy.cpu import BLOCK, ask, engine, oracle, run


def check(sched: Any) -> None:
    """Every block is held by exactly those who count as holding it, and is in one place."""
    manager, trie = sched.block_manager, sched.block_trie
    allocator = manager.allocator
    holders = np.zeros_like(allocator._log_mem.ref_count)
    for seq in sched.seq_manager.get_all_sequences():
        table = seq.logical_blocks.get_real_blocks()
        assert len(set(table.tolist())) == len(table)
        assert len(table) * BLOCK >= seq.num_history_ids
        np.add.at(holders, table, 1)
    nodes = [node for root in trie._roots.values() for node in root.children.values()]
    for node in nodes:
        holders[node.block] += 1
        assert (node in trie.leaves) == (not node.children)
        nodes.extend(node.children.values())
    assert holders.tolist() == allocator._log_mem.ref_count.tolist()
    live = np.flatnonzero(holders)
    physical = allocator.get_physical_blocks(live)
    assert len(set(physical.tolist())) == len(live)
    on_device = int((physical < manager.num_gpu_blocks).sum())
    assert manager.get_num_free_gpu_blocks() == manager.num_gpu_blocks - on_device
    leaving = sum(len(blocks) for blocks in manager._leaving_cpu)
    on_host = len(live) - on_device + leaving
    assert manager.get_num_free_cpu_blocks() == manager.num_cpu_blocks - on_host
    for seq in sched.locked:
        table = allocator.get_physical_blocks(seq.logical_blocks.get_real_blocks())
        assert (table < manager.num_gpu_blocks).all()
    assert sched.num_running() + sched.num_locked() <= sched.scheduler_config.max_batches


class RandomPlans:
    """Steps that are mostly possible, sometimes impossible, sometimes none."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.bound: list[int] = []
        self.block = 0

    def next_step(self, view: EngineView) -> PlanStep | None:
        rng = self.rng
        waiting = list(view.waiting) + [seen for seen in view.running if not seen.generated]
        decoding = [seen.id for seen in view.running if seen.generated]
        prefill: list[PrefillChunk] = []
        decode: list[str] = []
        dice = rng.random()
        if dice < 0.1:
            return None
        if dice < 0.2:
            return self._nonsense(view)
        if waiting and dice < 0.65:
            for seen in rng.sample(waiting, rng.randint(1, len(waiting))):
                whole = rng.random() < 0.6 or seen.prompt_len - seen.computed < 2
                stop = seen.prompt_len if whole else rng.randint(seen.computed + 1, seen.prompt_len)
                prefill.append(PrefillChunk(seen.id, min(seen.computed, stop - 1), stop))
        if decoding and (not prefill or rng.random() < 0.2):
            decode = rng.sample(decoding, rng.randint(1, len(decoding)))
        named = [chunk.request for chunk in prefill] + decode
        groups = (PrefixGroup(0, BLOCK * rng.randint(1, 4), tuple(named)),)
        return PlanStep(
            0,
            kv=self._moves(),
            binds=tuple(self._bind(chunk) for chunk in prefill),
            prefill=tuple(prefill),
            decode=tuple(decode),
            loops=rng.randint(1, 16),
            groups=groups if rng.random() < 0.5 else (),
        )

    def _bind(self, chunk: PrefillChunk) -> Bind:
        count = -(-chunk.stop // BLOCK)
        blocks = tuple(range(self.block, self.block + count))
        self.block += count
        self.bound += blocks
        return Bind(chunk.request, 0, blocks)

    def _moves(self) -> tuple[KVMove | KVFree, ...]:
        if not self.bound or self.rng.random() < 0.6:
            return ()
        some = tuple(self.rng.sample(self.bound, min(len(self.bound), self.rng.randint(1, 5))))
        choice = self.rng.random()
        if choice < 0.2:
            return (KVFree("device", some),)
        tiers = ("device", "host") if choice < 0.6 else ("host", "device")
        return (KVMove(*tiers, some, some),)

    def _nonsense(self, view: EngineView) -> PlanStep:
        names = [seen.id for seen in (*view.waiting, *view.running, *view.finished)] or ["ghost"]
        name = self.rng.choice([*names, "ghost"])
        start = self.rng.randint(-5, 200)
        chunk = PrefillChunk(name, start, start + self.rng.randint(-5, 400))
        prefill = (chunk,) * self.rng.randint(0, 2)
        return PlanStep(0, prefill=prefill, decode=(name,), loops=self.rng.randint(-1, 99))


async def client(eng: Any, rng: random.Random, session: int) -> None:
    """A conversation that comes at some time, and may be broken off."""
    for _ in range(rng.randrange(60)):
        await asyncio.sleep(0)
    said: list[int] = []
    for turn in range(rng.choice((1, 1, 2))):
        tokens = [rng.randrange(3)] * rng.randrange(0, 50) + [session + turn] * rng.randrange(1, 40)
        new = rng.randint(1, 40)
        asking = asyncio.ensure_future(ask(eng, session, tokens, new, end=False))
        if rng.random() < 0.2:
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            break
        answer = await asking
        assert answer == oracle(said + tokens, new)
        said += tokens + answer
    await eng.create_instance().async_end(session)


def play(eng: Any, rng: random.Random, clients: int) -> None:
    """All clients to the end; then only the cache holds blocks."""
    sched = eng.scheduler
    eng.executor.on_forward = lambda: check(sched)

    async def work() -> None:
        await asyncio.gather(*[client(eng, rng, session) for session in range(clients)])

    run(work, timeout=60)
    for session in list(sched.sessions):  # of clients that broke off
        sched.end_session(session)
    check(sched)
    assert not list(sched.seq_manager.get_all_sequences())
    held = set(sched.block_manager.allocator._log_mem.ref_count.tolist())
    assert held <= ({0, 1} if sched.block_trie.enable else {0})


FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(
    seed=st.integers(0, 10**6),
    blocks=st.sampled_from([22, 30, 64]),
    host=st.sampled_from([0, 0, 6, 40]),
    prefix=st.booleans(),
    overlap=st.booleans(),
)
@example(seed=334, blocks=22, host=0, prefix=True, overlap=False)  # nodes below a leaf
def test_random_plans(seed: int, blocks: int, host: int, prefix: bool, overlap: bool) -> None:
    rng = random.Random(seed)
    eng = engine(
        num_gpu_blocks=blocks,
        num_cpu_blocks=host,
        max_batch_size=rng.randint(1, 6),
        max_prefill_token_num=rng.choice((64, 200, 1000)),
        enable_prefix_caching=prefix,
    )
    PlanDriver(eng, RandomPlans(rng), overlap=overlap)
    play(eng, rng, rng.randint(1, 7))


@FEW
@given(
    seed=st.integers(0, 10**6),
    blocks=st.sampled_from([40, 64, 200]),
    host=st.sampled_from([0, 40]),
)
def test_the_online_planner(seed: int, blocks: int, host: int) -> None:
    rng = random.Random(seed)
    eng = engine(num_gpu_blocks=blocks, num_cpu_blocks=host, max_prefill_token_num=200)
    requests = NamedSequences(eng.scheduler, Names())
    planner = OnlinePlanner(target_of(eng), outlast=True)
    PlanDriver(eng, OnlineSource(planner, requests), requests)
    play(eng, rng, rng.randint(1, 7))


@pytest.mark.parametrize("seed", range(3))
def test_the_check_sees_a_leak(seed: int) -> None:
    eng = engine()
    play(eng, random.Random(seed), 3)
    eng.scheduler.block_manager.allocator.allocate(1)
    with pytest.raises(AssertionError):
        check(eng.scheduler)
