"""Block hit ratio of each eviction policy on a request trace.

    python benchmarks/eviction.py conversation_trace.jsonl.xz --percent 1 5 10 25

The trace has one JSON object a line with `hash_ids`: one id per block, equal ids for equal
prefixes (the format of Mooncake, FAST 2025). A hit is a block of a request's leading run of
resident blocks. A block leaves only after all that build on it have left. The policies are the
ones of the `evict` pass.
"""

import argparse
import json
import lzma
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sagellm_ir.passes.kv_policy import POLICIES, Entry, KVPolicy, Victims

Trace = list[list[int]]
"""Block ids of each request, in order of arrival."""


def read_trace(path: Path) -> Trace:
    """The block ids of a `.jsonl` or `.jsonl.xz` trace."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [list(json.loads(line)["hash_ids"]) for line in lines]


def next_uses(trace: Trace) -> list[list[float]]:
    """For each block of each request, the index of the next request that uses it."""
    coming: dict[int, int] = {}
    answer: list[list[float]] = []
    for index in range(len(trace) - 1, -1, -1):
        answer.append([coming.get(block, math.inf) for block in trace[index]])
        coming.update(dict.fromkeys(trace[index], index))
    answer.reverse()
    return answer


class BlockCache:
    """A cache of `capacity` blocks that form a forest; victims are leaves that are not in use."""

    def __init__(self, capacity: int, policy: KVPolicy) -> None:
        self.capacity = capacity
        self.policy = policy
        self.entries: dict[int, Entry] = {}
        self.parent: dict[int, int | None] = {}
        self.children: dict[int, int] = {}
        self.victims: Victims[int] = Victims()
        self._pinned: set[int] = set()

    def request(self, time: int, path: Sequence[int], following: Sequence[float]) -> int:
        """Runs one request; returns how many of its blocks, from the first on, were resident."""
        entries = self.entries
        hits = next((i for i, block in enumerate(path) if block not in entries), len(path))
        self._pinned = set(path)
        if hits:  # of a path only the last block can be a leaf, and so a candidate
            self.victims.withdraw(path[hits - 1])
        for block, coming in zip(path[:hits], following, strict=False):
            entry = entries[block]
            entry.used, entry.next_use = time, coming
            entry.uses += 1
        kept = hits
        while kept < len(path) and self._insert(time, path, kept, following[kept]):
            kept += 1
        if kept and not self.children.get(path[kept - 1]):
            self._offer(path[kept - 1])
        return hits

    def _insert(self, time: int, path: Sequence[int], at: int, coming: float) -> bool:
        """Makes `path[at]` resident; False when there is no better place for it than nowhere."""
        entry = Entry(inserted=time, used=time, uses=1, next_use=coming)
        if len(self.entries) >= self.capacity:
            worst = self.victims.first()
            if worst is None or (self.policy.bypass and self.policy.rank(entry) <= worst[0]):
                return False
            self._evict()
        block, parent = path[at], path[at - 1] if at else None
        self.entries[block], self.parent[block] = entry, parent
        if parent is not None:
            self.children[parent] = self.children.get(parent, 0) + 1
        return True

    def _offer(self, block: int) -> None:
        self.victims.offer(block, self.policy.rank(self.entries[block]))

    def _evict(self) -> None:
        found = self.victims.pop()
        assert found is not None, "the caller looked"
        rank, block = found
        self.policy.evicted(rank)
        del self.entries[block]
        parent = self.parent.pop(block)
        if parent is not None:
            self.children[parent] -= 1
            if not self.children[parent] and parent not in self._pinned:
                self._offer(parent)


def hit_ratio(trace: Trace, policy: KVPolicy, capacity: int, uses: list[list[float]]) -> float:
    """Hits of all requests over all block references."""
    cache = BlockCache(capacity, policy)
    hits = sum(cache.request(i, path, uses[i]) for i, path in enumerate(trace))
    return hits / max(1, sum(map(len, trace)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table: a row for each cache size, a column for each policy."""
    parser = argparse.ArgumentParser(description="Block hit ratio of each eviction policy.")
    parser.add_argument("trace", type=Path, help="a .jsonl or .jsonl.xz file with hash_ids")
    parser.add_argument("--percent", type=float, nargs="+", default=[1.0, 5.0, 10.0, 25.0])
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    options = parser.parse_args(arguments)
    try:
        trace = read_trace(options.trace)
    except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        print(f"cannot read {options.trace}: {error}", file=sys.stderr)
        return 1
    uses = next_uses(trace)
    unique = len({block for path in trace for block in path})
    references = sum(map(len, trace))
    print(f"{len(trace)} requests, {references} block references, {unique} unique blocks")
    print("  size " + "".join(f"{name:>9}" for name in options.policy))
    began = time.perf_counter()
    for percent in options.percent:
        capacity = int(unique * percent / 100)
        ratios = [hit_ratio(trace, POLICIES[name](), capacity, uses) for name in options.policy]
        print(f"{percent:5g}% " + "".join(f"{ratio:9.4f}" for ratio in ratios))
    print(f"{time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
