"""Patch 0001: block info, eviction callback, moves of shared blocks between device and host."""

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from lmdeploy.pytorch import envs, plugins
from lmdeploy.pytorch.engine.cache_engine import CacheEngine
from lmdeploy.pytorch.engine.model_agent import cache_swapping

from tests.lmdeploy import recordings
from tests.lmdeploy.cpu import BLOCK, add, blocks_of, decode, engine, prefill, scheduler, stop


def held(sched: Any) -> list[int]:
    """The reference counts of all logical blocks."""
    return [int(count) for count in sched.block_manager.allocator._log_mem.ref_count]


def shared(host: int = 16, blocks: int = 32) -> tuple[Any, Any, Any]:
    """Two sequences that share four blocks through the trie."""
    sched = scheduler(blocks=blocks, host=host)
    prompt = list(range(4 * BLOCK + 6))
    first = add(sched, 1, prompt)
    prefill(sched)
    decode(sched)
    second = add(sched, 2, prompt)
    prefill(sched)
    decode(sched)
    return sched, first, second


def test_block_info_tells_where_a_block_is_and_who_holds_it() -> None:
    sched, first, second = shared()
    info = sched.block_manager.get_block_info(blocks_of(first))
    assert info["ref_count"].tolist() == [
        3,
        3,
        3,
        3,
        1,
    ]  # two sequences and the trie; a private tail
    assert info["on_gpu"].all()
    assert info["physical"].tolist() == sched.block_manager.get_block_table(first).tolist()
    assert info["logical"].tolist()[:4] == blocks_of(second)[:4]


def test_a_shared_block_moves_for_all_who_hold_it() -> None:
    sched, first, second = shared()
    manager = sched.block_manager
    counts, free = held(sched), manager.get_num_free_gpu_blocks()
    assert manager.migrate_blocks(blocks_of(first)[:4], "cpu") == 4
    assert held(sched) == counts
    assert manager.get_num_free_gpu_blocks() == free + 4
    assert not manager.get_block_info(blocks_of(second)[:4])["on_gpu"].any()
    assert manager.migrate_blocks(blocks_of(first)[:4], "cpu") == 0
    assert manager.migrate_blocks(blocks_of(second)[:4], "gpu") == 4
    assert (held(sched), manager.get_num_free_gpu_blocks()) == (counts, free)
    manager.take_swaps()
    assert manager.get_num_free_cpu_blocks() == 16


def test_moves_ride_on_the_next_step_that_runs() -> None:
    sched, first, second = shared()
    stop(first, second)
    table = sched.block_manager.get_block_table(first).tolist()
    sched.block_manager.migrate_blocks(blocks_of(first)[:2], "cpu")
    assert sched.schedule(True).swap_out_map == {}  # nobody runs: the moves wait
    add(sched, 3, [1] * 5)
    output = sched.schedule(True)
    assert output.swap_out_map == {table[0]: 0, table[1]: 1}
    assert sched.block_manager.take_swaps() == ({}, {})


def test_a_host_block_is_not_reused_before_it_is_copied() -> None:
    sched, first, _ = shared(host=2)
    manager = sched.block_manager
    there, other = blocks_of(first)[:2], blocks_of(first)[2:4]
    manager.migrate_blocks(there, "cpu")
    manager.take_swaps()
    manager.migrate_blocks(there, "gpu")
    with pytest.raises(MemoryError):  # out runs before in: it would overwrite what comes back
        manager.migrate_blocks(other, "cpu")
    manager.take_swaps()
    assert manager.migrate_blocks(other, "cpu") == 2


def test_moves_that_could_lose_data_are_refused() -> None:
    sched, first, _ = shared()
    manager = sched.block_manager
    block = blocks_of(first)[:1]
    with pytest.raises(ValueError, match="free blocks"):
        manager.migrate_blocks([30], "cpu")
    manager.migrate_blocks(block, "cpu")
    manager.take_swaps()
    manager.migrate_blocks(block, "gpu")
    with pytest.raises(ValueError, match="pending"):
        manager.migrate_blocks(block, "cpu")


def test_a_full_pool_moves_nothing() -> None:
    sched, first, _ = shared(host=3)
    counts = held(sched)
    with pytest.raises(MemoryError):
        sched.block_manager.migrate_blocks(blocks_of(first)[:4], "cpu")
    assert sched.block_manager.get_block_info(blocks_of(first))["on_gpu"].all()
    assert held(sched) == counts


def test_stock_gives_host_blocks_to_the_gpu_and_the_patch_refuses(stock: Any) -> None:
    assert stock["faults"]["host_table"] == {"swapped": True, "beyond_gpu": True}
    with pytest.raises(RuntimeError, match="blocks on the host"):
        recordings.host_table()


def test_stock_swaps_in_before_out_without_waiting(
    stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stock["faults"]["swap_order"] == ["in", "out", "wait"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    assert recordings.swap_order() == ["sync", "out", "in", "wait"]


def cache_engine(monkeypatch: pytest.MonkeyPatch, device: int = 6, host: int = 4) -> Any:
    """A `CacheEngine` whose caches are allocated by its own code, on a CPU: 2 layers, block i holds i (host: 10 + i)."""
    cache = CacheEngine.__new__(CacheEngine)
    cache.num_layers, cache.kv_cache_dtype = 2, torch.float32
    cache.cache_config = types.SimpleNamespace(
        num_gpu_blocks=device, num_cpu_blocks=host, quant_policy=0
    )
    shape = (3, 1, 2)
    monkeypatch.setattr(cache, "get_key_block_shape", lambda local: shape)
    monkeypatch.setattr(cache, "get_value_block_shape", lambda local: shape)
    cache.full_gpu_cache = cache._allocate_cache(device, "cpu")
    cache.allocate_cpu_cache()
    for first, caches in ((0, cache.full_gpu_cache), (10, cache.full_cpu_cache)):
        for part in caches:
            part.copy_(torch.arange(first, first + part.shape[1]).reshape(1, -1, 1, 1, 1))
    cache.cache_stream = types.SimpleNamespace(wait_stream=lambda _: None)
    cache.events = types.SimpleNamespace(record=lambda stream: None, wait=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.inference_mode())
    return cache


def test_a_full_exchange_through_the_cache_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks leave, and what was on the host takes the place of some, in one step; in all layers and parts."""
    cache = cache_engine(monkeypatch)
    cache_swapping(cache, {0: 1, 2: 5, 3: 4}, {1: 1, 4: 0, 0: 2})
    for device, host in zip(cache.full_gpu_cache, cache.full_cpu_cache, strict=True):
        assert device.shape == (2, 6, 3, 1, 2)
        for content in device.flatten(2).permute(0, 2, 1).reshape(-1, 6).tolist():
            assert content == [0, 4, 2, 3, 13, 0]
        for content in host.flatten(2).permute(0, 2, 1).reshape(-1, 4).tolist():
            assert content == [4, 1, 0, 13]


def test_more_blocks_than_one_copy_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All leave, and come back in the opposite order."""
    count = 37
    cache = cache_engine(monkeypatch, device=count, host=count)
    cache_swapping(cache, {}, {at: count - 1 - at for at in range(count)})
    cache_swapping(cache, {at: at for at in range(count)}, {})
    for device in cache.full_gpu_cache:
        assert (device[1, :, 0, 0, 0] == torch.arange(count - 1, -1, -1)).all()


def test_a_block_of_the_host_is_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one copy moves it; and LMDeploy's list of layers is of the same memory."""
    cache = cache_engine(monkeypatch)
    assert all(part[:, 1].is_contiguous() for part in cache.full_cpu_cache)
    assert cache.cpu_cache[1][0].data_ptr() == cache.full_cpu_cache[0][1].data_ptr()


def test_the_callback_sees_every_eviction_before_it_happens() -> None:
    sched = scheduler(blocks=8)
    seen: list[tuple[str, list[int], Any]] = []

    def evicted(kind: str, blocks: np.ndarray, seq: Any) -> None:
        assert (sched.block_manager.allocator.get_ref_count(blocks) > 0).all()
        seen.append((kind, blocks.tolist(), seq))

    sched.block_manager.eviction_cb = evicted
    first = add(sched, 1, list(range(3 * BLOCK + 2)))
    prefill(sched)
    decode(sched)
    stop(first)
    table = blocks_of(first)
    add(sched, 2, [9] * (7 * BLOCK))
    assert len(prefill(sched)) == 1
    assert seen[0] == ("sequence", table, first)
    prefixes = [block for kind, blocks, seq in seen[1:] for block in blocks]
    assert [kind for kind, _, _ in seen[1:]] == ["prefix"] * (len(seen) - 1)
    assert prefixes == [table[2], table[1]]  # as many as were needed, the end first


def test_plugins_load_in_the_process_before_the_model_and_in_the_engine_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, Any]] = []
    module = types.SimpleNamespace(hello=lambda role, owner: calls.append((role, owner)))
    monkeypatch.setitem(sys.modules, "a_plugin", module)
    monkeypatch.setattr(envs, "pytorch_plugin", "a_plugin:hello,a_plugin:hello")
    plugins.load_plugins("process")
    assert calls == [("process", None)] * 2
    monkeypatch.setattr(envs, "pytorch_plugin", "a_plugin:hello")
    calls.clear()
    eng = engine()
    assert calls == [("process", None), ("engine", eng)]
    monkeypatch.setattr(envs, "pytorch_plugin", None)
    plugins.load_plugins("process")
    assert len(calls) == 2
