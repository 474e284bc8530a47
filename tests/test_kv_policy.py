"""Eviction policies: their order, and the trace replay that measures them."""

import json
import runpy
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.passes import kv_policy
from sagellm_ir.passes.kv_policy import POLICIES, Entry, KVPolicy, Victims, make_policy

EVICTION = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "eviction.py"))
BlockCache, hit_ratio = EVICTION["BlockCache"], EVICTION["hit_ratio"]
next_uses, main = EVICTION["next_uses"], EVICTION["main"]

ENTRIES = {
    "old": Entry(size=2, cost=8.0, inserted=0, used=9, uses=3, next_use=12),
    "mid": Entry(size=1, cost=1.0, inserted=1, used=5, uses=5, next_use=30),
    "new": Entry(size=4, cost=2.0, inserted=2, used=7, uses=1, next_use=20),
}


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("belady", ["mid", "new", "old"]),
        ("lru", ["mid", "new", "old"]),
        ("lfu", ["new", "old", "mid"]),
        ("fifo", ["old", "mid", "new"]),
        ("cost", ["new", "mid", "old"]),
    ],
)
def test_order(policy: str, order: list[str]) -> None:
    chosen = make_policy(policy)
    assert sorted(ENTRIES, key=lambda name: chosen.rank(ENTRIES[name])) == order


def test_cost_ages_what_is_not_used() -> None:
    policy = make_policy("cost")
    stale = policy.rank(ENTRIES["old"])
    policy.evicted(stale)
    assert policy.rank(ENTRIES["new"]) > stale


def test_unknown_policy_is_told_the_nearest() -> None:
    with pytest.raises(SageIRError, match="did you mean 'belady'"):
        make_policy("beladi")


def test_policies_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("mru", f"{__name__}:MRU", kv_policy.ENTRY_POINTS),
        EntryPoint("odd", "json:loads", kv_policy.ENTRY_POINTS),
    ]
    monkeypatch.setattr(kv_policy, "entry_points", lambda group: points)
    monkeypatch.setattr(EntryPoint, "load", lambda point: {"mru": MRU}.get(point.name, json.loads))
    assert isinstance(make_policy("mru"), MRU)
    with pytest.raises(SageIRError, match="no KVPolicy"):
        make_policy("odd")


class MRU(KVPolicy):
    """Most recently used first."""

    name = "mru"

    def rank(self, entry: Entry) -> tuple[float, ...]:
        return (-entry.used,)


def test_victims_leave_by_rank_then_key() -> None:
    victims: Victims[int] = Victims()
    for key, rank in ((3, 1.0), (1, 2.0), (2, 1.0), (4, 0.0)):
        victims.offer(key, (rank,))
    victims.withdraw(4)
    victims.offer(1, (0.5,))
    assert [found[1] for _ in range(3) if (found := victims.pop())] == [1, 2, 3]
    assert victims.pop() is None


paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=25)


def trie(draws: list[list[int]]) -> list[list[int]]:
    """Block ids of requests: an id for each distinct prefix of what was drawn."""
    ids: dict[tuple[int, ...], int] = {}
    return [
        [ids.setdefault(tuple(path[: i + 1]), len(ids)) for i in range(len(path))] for path in draws
    ]


@given(paths, st.integers(1, 12))
def test_no_policy_beats_belady(draws: list[list[int]], capacity: int) -> None:
    trace = trie(draws)
    uses = next_uses(trace)
    best = hit_ratio(trace, POLICIES["belady"](), capacity, uses)
    for name, policy in POLICIES.items():
        assert hit_ratio(trace, policy(), capacity, uses) <= best + 1e-9, name


@given(paths, st.integers(1, 12), st.sampled_from(sorted(POLICIES)))
def test_the_cache_is_a_forest_of_bounded_size(
    draws: list[list[int]], capacity: int, policy: str
) -> None:
    trace = trie(draws)
    cache = BlockCache(capacity, make_policy(policy))
    for time, (path, following) in enumerate(zip(trace, next_uses(trace), strict=True)):
        cache.request(time, path, following)
        assert len(cache.entries) <= capacity
        assert all(p is None or p in cache.entries for p in cache.parent.values())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"hash_ids": [0, 1]}, {"hash_ids": [2, 3]}, {"hash_ids": [0, 1]}]
    trace.write_text("\n".join(map(json.dumps, lines)))
    assert main([str(trace), "--percent", "50", "--policy", "belady", "lru"]) == 0
    assert "50%    0.3333   0.0000" in capsys.readouterr().out
    assert main([str(tmp_path / "none.jsonl")]) == 1
    assert "cannot read" in capsys.readouterr().err
