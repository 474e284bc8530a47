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
    """Of its prompt, also those that it has still to put there."""
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
    """Where `nodes` begin: at `node`, or behind what another prompt is putting below it."""
    nodes: list[Any]
    """Of the full blocks from `start` on, to be put into the trie; each below the one before it."""
    node: Any
    """How far the trie holds it at least."""
    blocks: Any
    """Those up to `node`, from the root's child on."""


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

    def read(self, seqs: Iterable[Any]) -> None:
        """Read the prompts of sequences that wait, so that their decision need not."""
        if self._trie.enable:
            for seq in seqs:
                if seq.seq_id not in self._prompts:
                    self._prompts[seq.seq_id] = self._read(seq, _reached(seq), ahead=True)

    def forget(self, seq: Any) -> None:
        """A sequence has gone, or has another turn."""
        self._prompts.pop(seq.seq_id, None)

    def found(self, seq: Any) -> int:
        """Blocks that a sequence without blocks was seen to find in the trie, when it was read or now."""
        prompt = self._prompts.get(seq.seq_id)
        if prompt is None or seq.logical_blocks._num_real:
            return 0
        if prompt.node.num_matched < prompt.start:
            self._follow(seq, prompt)
        return len(prompt.blocks)

    def common(self, seq: Any) -> int:
        """How many tokens of a sequence that was read others have computed, or are going to."""
        prompt = self._prompts.get(seq.seq_id)
        return 0 if prompt is None else prompt.start

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
        prompt, at = self._prompts.get(seq.seq_id), _reached(seq)
        if prompt is not None and not at:
            if prompt.node.num_matched and prompt.node.parent is None:
                prompt = None  # dropped, and so may be what is before it
            elif prompt.node.num_matched < max(prompt.start, 1):
                self._follow(seq, prompt)  # somebody else may have gone there
        if (
            prompt is None
            or prompt.known != len(seq.history_cache)
            or prompt.start > (at or prompt.node.num_matched)
        ):
            prompt = self._prompts[seq.seq_id] = self._read(seq, at)
        return prompt

    def _read(self, seq: Any, at: int, ahead: bool = False) -> _Prompt:
        """Read a prompt behind its first tokens, which its sequence has in the trie.

        Args:
            seq: its sequence.
            at: how many tokens that are.
            ahead: leave out what another prompt is expected to put into the trie before it is looked at.
        """
        size, known = self._size, len(seq.history_cache)
        tokens, root = seq.history_cache._token_ids, self._trie.get_root(seq.adapter_name)
        first = _key(tokens[: min(size, known)].tolist())
        prompt = _Prompt(known, first, at, [], root, NONE)
        if not at:
            common = self._follow(seq, prompt)
            prompt.start = common if ahead else prompt.node.num_matched
        rest = tokens[prompt.start : known]
        numbers = rest.tolist()
        prompt.nodes = [
            Node(_key(numbers[at : at + size]), -1, rest[at : at + size], prompt.start + at + size)
            for at in range(0, len(rest) - size + 1, size)
        ]
        for above, node in pairwise(prompt.nodes):
            node.parent = above
        return prompt

    def _follow(self, seq: Any, prompt: _Prompt) -> int:
        """Follow a trail as far as the tokens agree; the match goes on from there.

        Returns:
            How many tokens it has in common with the prompt of the trail, which may have to put some of
            them there still.
        """
        trail, size = self._trails.get(prompt.first), self._size
        if trail is None or self._is_tiered or trail.adapter != seq.adapter_name:
            return 0
        length: int = min(prompt.known - 1, len(trail.tokens)) // size * size
        differs = trail.tokens[:length] != seq.history_cache._token_ids[:length]
        common = int(differs.argmax()) if length else 0
        common = length if length and not differs[common] else common // size * size
        node = trail.node
        while node.parent is not None and node.num_matched > common:
            node = node.parent
        # A node that was dropped has no parent: the trail is cold.
        if not common or node.parent is None:
            return 0
        prompt.node, prompt.blocks = node, trail.blocks[: node.num_matched // size]
        return common

    def _remember(self, seq: Any, prompt: _Prompt, node: Any) -> None:
        """A prompt was stored up to a node. Of two ways with one start the longer one is kept."""
        at, size = node.num_matched, self._size
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
            tokens = seq.history_cache._token_ids[: prompt.known]
            trail = _Trail(seq.adapter_name, tokens, node, blocks)
        self._trails[prompt.first] = trail
        if len(self._trails) > _TRAILS:
            del self._trails[next(iter(self._trails))]


def _reached(seq: Any) -> int:
    """How many tokens a sequence has in the trie."""
    cursor = seq.logical_blocks.last_shared_node
    return 0 if cursor is None else int(cursor.num_matched)


def _is_equal(node: Any, other: Any) -> bool:
    """Whether the tokens of two nodes are the same."""
    return bool((node.tokens == other.tokens).all())


def _key(tokens: list[int]) -> int:
    """That of `BlockTrie`: equal numbers have equal hashes, whoever holds them."""
    return hash(("random", tuple(tokens)))
