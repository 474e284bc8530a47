"""KV of LMDeploy's engine under a plan: safe sharing, spills to the host, victims.

Needs patches 0001 and 0002. What it guards against (defects of v0.11.0, docs/lmdeploy.md): B1, a match
appended behind blocks that a sequence owns already; B3, a last-use clock that counts whole seconds;
B4, blocks held by a sequence that was not admitted; host blocks in a table that the GPU reads.
"""

import heapq
import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from attrs import define
from lmdeploy.pytorch.messages import MessageStatus

__all__ = ["KVCounters", "KVManager"]

logger = logging.getLogger(__name__)

_SPARE = 128
"""A part of the pool that is had free at once, when blocks are short: one in so many."""


@define
class KVCounters:
    """Blocks, since the manager was made."""

    fetched: int = 0
    """Taken from the trie instead of computed."""
    stored: int = 0
    """Put into the trie, or replaced by a block that it held."""
    spilled: int = 0
    restored: int = 0
    dropped: int = 0
    """Freed from the trie to make room."""


class KVManager:
    """The block manager and trie of one scheduler. Attaching it sets the hooks; `detach` unsets them.

    Args:
        scheduler: LMDeploy's `Scheduler`, patched.
        on_evict: called as `on_evict(kind, logical_blocks, sequence)` before blocks are freed to
            make room; kind is "sequence" or "prefix", the sequence None for a prefix.
    """

    def __init__(
        self, scheduler: Any, on_evict: Callable[[str, Any, Any], None] | None = None
    ) -> None:
        self.scheduler = scheduler
        self.blocks = scheduler.block_manager
        self.trie = scheduler.block_trie
        self.counters = KVCounters()
        self.expendable: set[int] = set()
        """Logical blocks that go first, however lately used; until they are fetched or stored again."""
        self.trie.hook = self
        self.blocks.eviction_cb = on_evict
        memory = self.blocks.allocator._log_mem
        self._coarse_clock = memory.access_time
        memory.access_time = memory.access_time.astype(np.float64)  # B3

    def detach(self) -> None:
        """The stock behaviour from here on."""
        self.trie.hook = None
        self.blocks.eviction_cb = None
        memory = self.blocks.allocator._log_mem
        memory.access_time = memory.access_time.astype(self._coarse_clock.dtype)

    # The hook of BlockTrie.

    def before_fetch(self, seq: Any) -> bool:
        """Whether to match: not when the sequence owns blocks behind its cursor (B1)."""
        cursor = getattr(seq.logical_blocks, "last_shared_node", None)
        shared: int = 0 if cursor is None else cursor.num_matched
        owned: int = len(seq.logical_blocks) * self.trie.block_size
        return owned <= shared

    def can_fetch(self, node: Any) -> bool:
        """Whether a node's block is on the device, or could be brought back to it."""
        if self.blocks.num_cpu_blocks == 0 or self.on_device(node.block):
            return True
        # Nothing may be evicted here: the nodes matched so far are not yet referenced.
        return self.blocks.get_num_free_gpu_blocks() > 0 and self.restore([node.block])

    def after_fetch(self, seq: Any, blocks: Iterable[int]) -> None:
        """Count a match."""
        taken = list(blocks)
        self.counters.fetched += len(taken)
        if self.expendable:
            self.expendable.difference_update(taken)

    def before_store(self, seq: Any) -> bool:
        """Whether to insert: always."""
        return True

    def after_store(self, seq: Any, blocks: Iterable[int], replaced: Iterable[int]) -> None:
        """Count an insertion. LMDeploy leaves a leaf that it went through and put nodes below among
        the leaves; it is taken out."""
        kept = list(blocks)
        self.counters.stored += len(kept)
        node = seq.logical_blocks.last_shared_node
        above = node.parent if tuple(replaced) else None
        for _ in kept:
            if above is None:
                break
            self.trie.leaves.discard(above)
            above = above.parent
        if self.expendable:
            self.expendable.difference_update(kept)

    def store_answer(self, seq: Any) -> None:
        """Put the full blocks of a sequence whose answer has ended into the trie.

        Its newest token has no KV. Stock inserts at each decode what was full before; this finds the
        same and the last blocks too, at one insertion an answer.
        """
        table, size = seq.logical_blocks, self.trie.block_size
        cursor = getattr(table, "last_shared_node", None)
        matched = 0 if cursor is None else cursor.num_matched
        if matched + size <= seq.num_history_ids <= len(table) * size:
            newest = seq._num_token_ids
            seq._num_token_ids = 0
            try:
                self.trie.allocate(seq)
            finally:
                seq._num_token_ids = newest

    # Admission.

    def undo(self, seq: Any, blocks: int, cursor: Any, history: int) -> None:
        """Give back what a match took, after a sequence could not be admitted (B4).

        Args:
            seq: the sequence.
            blocks: how many it had before.
            cursor: where it was in the trie.
            history: its computed tokens.
        """
        table = seq.logical_blocks
        taken = table.get_real_blocks()[blocks:].copy()
        if len(taken):
            self.blocks.allocator.free(taken)
            table.resize(blocks)
            seq.set_step(history)
        table.last_shared_node = cursor

    # Residency.

    def on_device(self, block: int) -> bool:
        """Whether a logical block is in the GPU's pool."""
        physical = self.blocks.allocator.get_physical_blocks(np.array([block]))
        return bool(physical[0] < self.blocks.num_gpu_blocks)

    def restore(self, blocks: Iterable[int]) -> bool:
        """Bring logical blocks to the device before the next forward; False: there is no room."""
        wanted = np.array([block for block in blocks if not self.on_device(block)], dtype=np.int64)
        if len(wanted) > self.blocks.get_num_free_gpu_blocks():
            return False
        self.counters.restored += self.blocks.migrate_blocks(wanted, "gpu")
        return True

    def spill(self, blocks: Iterable[int]) -> bool:
        """Move logical blocks to the host before the next forward; False: not all could be moved.

        The caller must know that no forward in flight uses them.
        """
        wanted = np.array([block for block in blocks if self.on_device(block)], dtype=np.int64)
        try:
            self.counters.spilled += self.blocks.migrate_blocks(wanted, "cpu")
        except (MemoryError, ValueError) as error:
            logger.debug("not spilled: %s", error)
            return False
        return True

    def make_resident(self, seq: Any) -> bool:
        """Bring all blocks of a sequence to the device; False: there is no room."""
        if self.blocks.num_cpu_blocks == 0:
            return True
        table = [int(block) for block in seq.logical_blocks.get_real_blocks()]
        missing = sum(not self.on_device(block) for block in table)
        if missing and not self.make_room(missing):
            return False
        return self.restore(table)

    def release(self, seq: Any) -> None:
        """Free all blocks of a sequence that is not in flight; it will be computed again."""
        self.blocks.free(seq)
        seq.set_step(0)
        seq.status = MessageStatus.WAITING

    # Victims.

    def make_room(self, blocks: int) -> bool:
        """Have so many device blocks free: spill or drop cached prefixes that nobody uses.

        Expendable ones, then least recently used; the far end of a prefix before its start. False: not enough of
        them; sequences would have to be evicted.
        """
        missing: int = blocks - self.blocks.get_num_free_gpu_blocks()
        if missing <= 0:
            return True
        if self.blocks.num_cpu_blocks == 0:
            # With a little more at a time, a step of many rows looks for victims once.
            return self._drop_coldest(missing + self._spare) >= missing
        heap = [(self._last_use(node), id(node), node) for node in self._frontier()]
        heapq.heapify(heap)
        while missing > 0 and heap:
            _, _, node = heapq.heappop(heap)
            parent = node.parent
            if not self._evict(node):
                continue
            missing -= 1
            if parent.parent is not None and self._is_victim(parent):
                heapq.heappush(heap, (self._last_use(parent), id(parent), parent))
        return missing <= 0

    def keep_room(self) -> None:
        """Have some blocks free before somebody needs them; forwards may be in flight."""
        if self.blocks.num_cpu_blocks == 0:
            self.make_room(self._spare)

    @property
    def _spare(self) -> int:
        return int(self.blocks.num_gpu_blocks) // _SPARE

    def _drop_coldest(self, count: int) -> int:
        """Take victims out of the trie, where no host tier could have them; how many there were."""
        memory, trie = self.blocks.allocator._log_mem, self.trie
        leaves = list(trie.leaves)
        blocks = np.fromiter([leaf.block for leaf in leaves], np.int64, len(leaves))
        times = memory.access_time[blocks]
        if self.expendable:
            times[np.isin(blocks, list(self.expendable))] = 0.0
        idle = (memory.ref_count[blocks] == 1).nonzero()[0]
        # Each gives one block at least: the coldest `count` of them are enough.
        coldest = idle[np.argsort(times[idle], kind="stable")[:count]].tolist()
        heap = [(float(times[at]), at, leaves[at]) for at in coldest]  # sorted, so a heap
        dropped: list[int] = []
        while heap and len(dropped) < count:
            _, at, node = heapq.heappop(heap)
            parent, node.parent = node.parent, None
            trie.leaves.discard(node)
            dropped.append(node.block)
            if parent.parent is not None and not parent.children:
                trie.leaves.add(parent)
                if memory.ref_count[parent.block] == 1:
                    heapq.heappush(heap, (self._last_use(parent), at, parent))
        if dropped:
            gone = np.array(dropped)
            if self.blocks.eviction_cb is not None:
                self.blocks.eviction_cb("prefix", gone, None)
            self.blocks.allocator.free(gone)
            self.counters.dropped += len(dropped)
            self.expendable.difference_update(dropped)
        return len(dropped)

    def _frontier(self) -> list[Any]:
        """Nodes on the device that only the trie holds, with none on the device below them."""
        seen: dict[int, Any] = {}
        for leaf in self.trie.leaves:
            node = leaf
            while node.parent is not None and not self.on_device(node.block):
                node = node.parent
            if node.parent is not None and self._is_victim(node):
                seen[id(node)] = node
        return list(seen.values())

    def _is_victim(self, node: Any) -> bool:
        if self._references(node) != 1 or not self.on_device(node.block):
            return False
        return not any(self.on_device(child.block) for child in node.children.values())

    def _evict(self, node: Any) -> bool:
        """Take a node off the device: to the host when it has room, else out of the trie."""
        if self.blocks.get_num_free_cpu_blocks() > 0 and self.spill([node.block]):
            return True
        if any(self._references(child) != 1 for child in self._below(node)):
            return False
        for child in [*self._below(node), node]:
            self._drop(child)
        return True

    def _below(self, node: Any) -> list[Any]:
        """The nodes under a node, children before their parents."""
        return [
            found
            for child in list(node.children.values())
            for found in [*self._below(child), child]
        ]

    def _drop(self, node: Any) -> None:
        parent = node.parent
        if self.blocks.eviction_cb is not None:
            self.blocks.eviction_cb("prefix", np.array([node.block]), None)
        node.parent = None
        self.trie.leaves.discard(node)
        if parent.parent is not None and not parent.children:
            self.trie.leaves.add(parent)
        self.blocks.allocator.free(np.array([node.block]))
        self.counters.dropped += 1

    def _references(self, node: Any) -> int:
        return int(self.blocks.allocator.get_ref_count(np.array([node.block]))[0])

    def _last_use(self, node: Any) -> float:
        if node.block in self.expendable:
            return 0.0
        return float(self.blocks.allocator.get_access_time(np.array([node.block]))[0])
