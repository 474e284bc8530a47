"""`Prefixes`: LMDeploy's trie, as `BlockTrie.match` and `allocate(replace=False)` use it, for prefills
under a plan.

The same nodes under the same keys, so that LMDeploy's own calls find them. A prompt is read while it
waits; the tokens of a block are hashed as Python's numbers, which takes a fifth of the time that
numpy's take; and a prefix that others have is compared as a whole, at a thousandth of the cost of
matching it block by block.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from attrs import define
from lmdeploy.pytorch.paging.block_trie import Node

from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager

__all__ = ["NONE", "Prefixes"]

_TRAILS = 64
"""First blocks whose last way through the trie is remembered."""
NONE = np.empty(0, np.int64)
"""No blocks."""


@define(eq=False)
class _Trail:
    """The way of one sequence through the trie, for the next that starts with the same tokens."""

    adapter: str | None
    tokens: Any
    node: Any
    """Where it ends."""
    blocks: Any
    """From the root's child on."""


@define(eq=False)
class _Prompt:
    """What was read of a prompt."""

    known: int
    """Its tokens then."""
    first: int
    """The key of its first block."""
    start: int
    """Where `nodes` begin."""
    nodes: list[Any]
    """Of the full blocks from `start` on, to be put into the trie; each below the one before it."""
    node: Any
    """How far the trie holds it at least."""
    blocks: Any
    """Those up to `node`, from the root's child on."""
    tokens: Any
    stored: int
    """How many of them are in the trie at least."""


class Prefixes:
    """What the trie holds of prompts is taken, and the rest put there before it is computed.

    Args:
        kv: the trie's hook, which has a say.
    """

    def __init__(self, kv: KVManager) -> None:
        self._hook, self._trie, self._size = kv, kv.trie, kv.trie.block_size
        self._is_tiered = kv.blocks.num_cpu_blocks > 0
        self._prompts: dict[int, _Prompt] = {}
        """By sequence: those that have not been stored to their ends."""
        self._trails: dict[int, _Trail] = {}
        """By the key of the first block: the last one of each of a few."""
        self._leaders: dict[tuple[Any, int], _Prompt] = {}
        """By adapter and first block: the first prompt that was read and is not stored to its end."""
        self._followers: dict[int, tuple[_Prompt, int]] = {}
        """By sequence: a leader, and how many first tokens it has in common with it."""

    def read(self, seqs: Iterable[Any]) -> None:
        """Read the prompts of sequences that wait, so that their decision need not. Not yet those of
        which another one will put more into the trie: behind that there is less to read."""
        if self._trie.enable:
            for seq in seqs:
                if seq.seq_id not in self._prompts and not self._follows(seq):
                    self._prompt(seq)

    def _follows(self, seq: Any) -> bool:
        """Whether a leader has yet to store what a prompt has in common with it."""
        if self._is_tiered:
            return False
        leader, common = self._followers.get(seq.seq_id, (None, 0))
        if leader is None or self._leaders.get((seq.adapter_name, leader.first)) is not leader:
            tokens, known = seq.history_cache._token_ids, len(seq.history_cache)
            leader = self._leaders.get((seq.adapter_name, _key(tokens[: self._size].tolist())))
            if leader is None:
                return False
            common = _agree(leader.tokens, tokens, min(leader.known, known - 1))
            common -= common % self._size
            self._followers[seq.seq_id] = leader, common
        return leader.stored < common

    def forget(self, seq: Any) -> None:
        """A sequence has gone, or has another turn."""
        self._followers.pop(seq.seq_id, None)
        prompt = self._prompts.pop(seq.seq_id, None)
        if prompt is not None and self._leaders.get((seq.adapter_name, prompt.first)) is prompt:
            del self._leaders[seq.adapter_name, prompt.first]

    def found(self, seq: Any) -> int:
        """Blocks that a sequence without blocks was seen to find in the trie, when it was read."""
        prompt = self._prompts.get(seq.seq_id)
        return 0 if prompt is None or seq.logical_blocks._num_real else len(prompt.blocks)

    def fetch(self, seq: Any) -> None:
        """Give a sequence the blocks that the trie holds of its prompt."""
        trie, hook, table, size = self._trie, self._hook, seq.logical_blocks, self._size
        if not trie.enable or not hook.before_fetch(seq):
            return
        prompt, node, blocks = self._prompt(seq), table.last_shared_node, NONE
        if node is None or node.num_matched == 0:
            node, blocks = prompt.node, prompt.blocks
        at, most = node.num_matched, seq._num_history_ids + seq._num_token_ids
        found: list[int] = []
        while node.children and at + size < most:
            wanted = prompt.nodes[(at - prompt.start) // size]
            child = node.children.get(wanted.hash_key)
            if child is None or not _is_equal(child, wanted) or not hook.can_fetch(child):
                break
            found.append(child.block)
            node, at = child, at + size
        if found:
            blocks = np.concatenate((blocks, found))
        if len(blocks):
            trie.allocator.update_access_time(blocks)
            trie.allocator._log_mem.ref_count[blocks] += 1  # no block stands twice on a way
            table.append(blocks)
            seq.set_step(at)
        table.last_shared_node = node
        hook.after_fetch(seq, blocks.tolist())

    def store(self, seq: Any) -> None:
        """Put the full blocks of a prompt that is about to be computed into the trie, up to the first
        that it holds already: nobody may be given a block for one that others read."""
        trie, hook, table, size = self._trie, self._hook, seq.logical_blocks, self._size
        if not trie.enable or not hook.before_store(seq):
            return
        node = table.last_shared_node or trie.get_root(seq.adapter_name)
        table.last_shared_node = node
        first, stop = node.num_matched, (seq._num_history_ids + seq._num_token_ids) // size * size
        if first >= stop:
            return
        prompt = self._prompt(seq)
        nodes = prompt.nodes[(first - prompt.start) // size : (stop - prompt.start) // size]
        blocks = table._blocks[first // size : stop // size]
        if not node.children:
            trie.leaves.discard(node)
        kept = blocks.tolist() if nodes[0].hash_key not in node.children else []
        if kept:  # below a new node there are none but those of this prompt
            for child, block in zip(nodes, kept, strict=True):
                child.block = block
                if child._parent is not node:
                    child.parent = node
                node = child
            for later in [*node.children.values()]:  # of what this chunk does not compute
                later.parent = None
            trie.allocator._log_mem.ref_count[blocks] += 1
        table.last_shared_node = node
        if node.parent is not None and not node.children:
            trie.leaves.add(node)
        hook.after_store(seq, kept, ())
        self._remember(seq, prompt, node)

    def _prompt(self, seq: Any) -> _Prompt:
        """What is known of a prompt, from where its sequence is in the trie; read if it was not."""
        prompt, cursor = self._prompts.get(seq.seq_id), seq.logical_blocks.last_shared_node
        at = 0 if cursor is None else cursor.num_matched
        if prompt is not None and not at:
            if prompt.node.num_matched == 0:
                self._follow(seq, prompt)  # somebody else may have gone there
            elif prompt.node.parent is None:  # dropped, and so may be what is before it
                prompt = None
        if (
            prompt is None
            or prompt.known != len(seq.history_cache)
            or prompt.start > (at or prompt.node.num_matched)
        ):
            self.forget(seq)
            prompt = self._prompts[seq.seq_id] = self._read(seq, at)
        return prompt

    def _read(self, seq: Any, at: int) -> _Prompt:
        """Read a prompt behind its first tokens, which its sequence has in the trie."""
        size, known = self._size, len(seq.history_cache)
        tokens, root = seq.history_cache._token_ids, self._trie.get_root(seq.adapter_name)
        first = _key(tokens[: min(size, known)].tolist())
        prompt = _Prompt(known, first, at, [], root, NONE, tokens, at)
        if not at:
            self._follow(seq, prompt)
            prompt.start = prompt.stored = prompt.node.num_matched
        self._leaders.setdefault((seq.adapter_name, first), prompt)
        rest = tokens[prompt.start : known]
        numbers = rest.tolist()
        prompt.nodes = [
            Node(_key(numbers[at : at + size]), -1, rest[at : at + size], prompt.start + at + size)
            for at in range(0, len(rest) - size + 1, size)
        ]
        for above, node in pairwise(prompt.nodes):
            node.parent = above
        return prompt

    def _follow(self, seq: Any, prompt: _Prompt) -> None:
        """Follow a trail as far as the tokens agree; the match goes on from there."""
        trail, size = self._trails.get(prompt.first), self._size
        if trail is None or self._is_tiered or trail.adapter != seq.adapter_name:
            return
        node = trail.node
        length = min((prompt.known - 1) // size * size, node.num_matched)
        common = _agree(trail.tokens, seq.history_cache._token_ids, length) // size * size
        while node.parent is not None and node.num_matched > common:
            node = node.parent
        # A node that was dropped has no parent: the trail is cold.
        if common and node.parent is not None:
            prompt.node, prompt.blocks = node, trail.blocks[: common // size]

    def _remember(self, seq: Any, prompt: _Prompt, node: Any) -> None:
        """A prompt was stored up to a node. Of two ways with one start the longer one is kept."""
        at, size = node.num_matched, self._size
        prompt.stored = at
        if at + size > prompt.known:
            self.forget(seq)
        if node.parent is None:
            return
        trail = self._trails.pop(prompt.first, None)
        if (
            trail is None
            or trail.node.parent is None
            or trail.node.num_matched < at
            or trail.adapter != seq.adapter_name
        ):
            blocks = seq.logical_blocks._blocks[: at // size].copy()
            trail = _Trail(seq.adapter_name, seq.history_cache._token_ids, node, blocks)
        self._trails[prompt.first] = trail
        if len(self._trails) > _TRAILS:
            del self._trails[next(iter(self._trails))]


def _agree(one: Any, two: Any, most: int) -> int:
    """How many leading tokens are equal, of so many at most."""
    differs = one[:most] != two[:most]
    first = int(differs.argmax()) if most else 0
    return first if most and differs[first] else most


def _is_equal(node: Any, other: Any) -> bool:
    """Whether the tokens of two nodes are the same."""
    return bool((node.tokens == other.tokens).all())


def _key(tokens: list[int]) -> int:
    """That of `BlockTrie`: equal numbers have equal hashes, whoever holds them."""
    return hash(("random", tuple(tokens)))
