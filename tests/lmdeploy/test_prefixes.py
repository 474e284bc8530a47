"""Prefixes under a plan: what LMDeploy's own trie would do, with fewer steps."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_ir.lowering.plan import PrefixGroup
from sagellm_ir.runtime.engines.lmdeploy import prefixes as module
from sagellm_ir.runtime.engines.lmdeploy.grouping import Agreed, group_rows
from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager
from sagellm_ir.runtime.engines.lmdeploy.prefixes import Prefixes
from tests.lmdeploy.cpu import BLOCK, add, blocks_of, scheduler, stop


def nodes(node: Any) -> Any:
    """A trie below a node: keys, blocks and tokens."""
    return {
        key: (child.block, child.num_matched, child.tokens.tolist(), nodes(child))
        for key, child in node.children.items()
    }


def admitted(prompts: list[list[int]], ours: bool, read: frozenset[int] = frozenset()) -> Any:
    """The trie, references, leaves and tables after prompts were admitted; every third has ended.

    `read`: those that are read before the first is admitted.
    """
    sched = scheduler(blocks=256)
    kv = KVManager(sched)
    prefixes, trie, tables = Prefixes(kv), sched.block_trie, []
    seqs = [add(sched, number + 1, prompt) for number, prompt in enumerate(prompts)]
    prefixes.read(seqs[number] for number in read if number < len(seqs))
    for number, seq in enumerate(seqs):
        prefixes.fetch(seq) if ours else trie.match(seq)
        sched.block_manager.allocate(seq, 0)
        prefixes.store(seq) if ours else trie.allocate(seq, replace=False)
        tables.append((blocks_of(seq), seq.num_history_ids))
        if number % 3 == 0:
            stop(seq)
            sched.end_session(number + 1)
    leaves = sorted(leaf.block for leaf in trie.leaves)
    counts = sched.block_manager.allocator._log_mem.ref_count.tolist()
    return nodes(trie.get_root(None)), leaves, counts, tables, kv.counters


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5 * BLOCK), st.integers(0, 3))),
    st.frozensets(st.integers(0, 8)),
)
@settings(deadline=None, max_examples=60)
def test_prefixes_are_fetched_and_stored_as_lmdeploy_does(
    shapes: list[tuple[int, int, int]], read: frozenset[int]
) -> None:
    prompts = [[first] * length + [9] * (more * BLOCK) for first, length, more in shapes]
    assert admitted(prompts, ours=True, read=read) == admitted(prompts, ours=False)


@pytest.mark.parametrize("common", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5, 4 * BLOCK, 6 * BLOCK + 9])
@pytest.mark.parametrize("evicted", [0, 1, 5])
@pytest.mark.parametrize("read", ["never", "before the eviction", "after it"])
def test_what_was_read_is_what_the_match_finds(common: int, evicted: int, read: str) -> None:
    """The same blocks, step and references as matching block by block, also after evictions."""
    first = list(range(6 * BLOCK + 9))
    found = []
    for ours in (True, False):
        sched = scheduler()
        prefixes, trie = Prefixes(KVManager(sched)), sched.block_trie
        one = add(sched, 1, first)
        prefixes.fetch(one)
        sched.block_manager.allocate(one, 0)
        prefixes.store(one)
        stop(one)
        sched.end_session(1)
        seq = add(sched, 2, [*first[:common], *[9999] * (7 * BLOCK - common)])
        if read == "before the eviction":
            prefixes.read([seq])
        if evicted:
            trie.evict(evicted)
        if read == "after it":
            prefixes.read([seq])
        prefixes.fetch(seq) if ours else trie.match(seq)
        counts = sched.block_manager.allocator._log_mem.ref_count
        cursor = seq.logical_blocks.last_shared_node
        found.append((blocks_of(seq), seq.num_history_ids, counts.tolist(), cursor.num_matched))
    assert found[0] == found[1]
    assert found[0][1] == min(common // BLOCK, 6 - evicted) * BLOCK


@pytest.mark.parametrize("evicted", [0, 1, 4])
@pytest.mark.parametrize("anew", [False, True])
def test_a_prompt_that_lost_its_blocks_after_a_chunk_is_matched_again(
    evicted: int, anew: bool
) -> None:
    """`anew`: each chunk reads it."""
    sched = scheduler()
    kv = KVManager(sched)
    prefixes, seq = Prefixes(kv), add(sched, 1, list(range(6 * BLOCK)))
    for chunk in (2, 2):
        if anew:
            prefixes.forget(seq)
        prefixes.fetch(seq)
        seq._num_token_ids = chunk * BLOCK
        sched.block_manager.allocate(seq, 0)
        prefixes.store(seq)
        seq._num_history_ids += seq._num_token_ids
        seq._num_token_ids = 6 * BLOCK - seq._num_history_ids
    kv.release(seq)
    if evicted:
        sched.block_trie.evict(evicted)
    prefixes.fetch(seq)
    assert seq.num_history_ids == (4 - evicted) * BLOCK == len(blocks_of(seq)) * BLOCK
    sched.block_manager.allocate(seq, 0)
    prefixes.store(seq)
    two = add(sched, 2, [*range(6 * BLOCK), 7])
    prefixes.fetch(two)
    assert blocks_of(two) == blocks_of(seq)


def compute(sched: Any, seq: Any, ours: Prefixes | None, blocks: int) -> None:
    """Admit a chunk of a sequence, of some blocks or of all that is left, and compute it."""
    ours.fetch(seq) if ours else sched.block_trie.match(seq)
    known = len(seq.history_cache)
    seq._num_token_ids = min(known - seq._num_history_ids, blocks * BLOCK)
    sched.block_manager.allocate(seq, 0)
    ours.store(seq) if ours else sched.block_trie.allocate(seq, replace=False)
    seq._num_history_ids += seq._num_token_ids
    seq._num_token_ids = known - seq._num_history_ids


@given(
    st.lists(st.sampled_from([1, 2, 5]), max_size=5),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3 * BLOCK)), min_size=1, max_size=4),
    st.integers(0, 4),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=80)
def test_a_prompt_may_be_read_while_another_puts_what_they_share_into_the_trie(
    chunks: list[int], others: list[tuple[int, int]], read: int, evicted: int
) -> None:
    """`chunks` of the one that leads; the others, by common blocks and tokens of their own, are read
    after `read` of them, and computed after all, whether or not that is the whole of it."""
    lead = list(range(5 * BLOCK + 3))
    found = []
    for ours in (True, False):
        sched = scheduler(blocks=256)
        prefixes = Prefixes(KVManager(sched)) if ours else None
        first = add(sched, 1, lead)
        seqs = [
            add(sched, number, [*lead[: common * BLOCK], *[9999] * own, 5])
            for number, (common, own) in enumerate(others, 2)
        ]
        for at, chunk in enumerate([*chunks, 0]):
            if prefixes and at == read:
                prefixes.read(seqs)
            if chunk and first.num_history_ids < len(lead):
                compute(sched, first, prefixes, chunk)
        if evicted:  # what leads has gone, and some of what it put there
            stop(first)
            sched.end_session(1)
            sched.block_trie.evict(evicted)
        for seq in seqs:
            compute(sched, seq, prefixes, 99)
        counts = sched.block_manager.allocator._log_mem.ref_count.tolist()
        tables = [blocks_of(seq) for seq in seqs]
        found.append((nodes(sched.block_trie.get_root(None)), counts, tables))
    assert found[0] == found[1]


def test_what_another_prompt_puts_into_the_trie_is_not_read_by_those_that_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sched = scheduler(blocks=256)
    prefixes, lead = Prefixes(KVManager(sched)), list(range(20 * BLOCK))
    first = add(sched, 1, lead)
    compute(sched, first, prefixes, 2)
    made: list[Any] = []

    class Counted(module.Node):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(module, "Node", Counted)
    seqs = [add(sched, number, [*lead, *[number] * BLOCK, 5]) for number in range(2, 9)]
    prefixes.read(seqs)
    assert len(made) == len(seqs)
    compute(sched, first, prefixes, 99)
    for seq in seqs:
        compute(sched, seq, prefixes, 99)
    assert len(made) == len(seqs)
    assert all(blocks_of(seq)[:20] == blocks_of(first) for seq in seqs)


def rows_of(starts: list[int]) -> tuple[Any, dict[str, Any]]:
    """Sequences r0, r1, ... whose first two blocks are those of a prefix."""
    sched = scheduler()
    prefixes = Prefixes(KVManager(sched))
    here = {}
    for number, start in enumerate(starts):
        seq = add(sched, number + 1, [start] * 2 * BLOCK + [number + 50] * 3)
        prefixes.fetch(seq)
        sched.block_manager.allocate(seq, 0)
        prefixes.store(seq)
        here[f"r{number}"] = seq
    return sched, here


def test_groups_of_equal_range_are_told_apart_also_when_their_rows_change() -> None:
    _, here = rows_of([1, 2, 1, 2, 1])
    agreed: Agreed = {}
    for left in (set[str](), {"r0"}, {"r3"}):
        some = {name: seq for name, seq in here.items() if name not in left}
        ones = tuple(name for name in ("r0", "r2", "r4") if name in some)
        twos = tuple(name for name in ("r1", "r3") if name in some)
        groups = [PrefixGroup(0, 2 * BLOCK, ones), PrefixGroup(0, 2 * BLOCK, twos)]
        ordered, table = group_rows(some, groups, agreed)
        assert ordered == [here[name] for name in (*ones, *twos)]
        wanted = [(0, 2 * BLOCK, 0, len(ones)), (0, 2 * BLOCK, len(ones), len(twos))]
        assert table == [entry for entry in wanted if entry[3] > 1]


def test_a_row_that_left_a_group_is_looked_at_again() -> None:
    """Its name may be that of another request by then."""
    _, here = rows_of([1, 1, 1, 2])
    agreed: Agreed = {}
    for names, grouped in (("r0 r1 r2", 3), ("r0 r1", 2), ("r0 r1 r2", 0)):
        some = {name: here[name] for name in names.split()}
        if not grouped:
            some["r2"] = here["r3"]
        _, table = group_rows(some, [PrefixGroup(0, 2 * BLOCK, tuple(some))], agreed)
        assert [count for *_, count in table] == ([grouped] if grouped else [])
