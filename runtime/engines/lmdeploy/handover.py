"""KV of a prefix from one LMDeploy worker to another: `send_prefix` there, `receive_prefix` here.

Both run between forwards. What the sender holds stays its own, with the references it had; the
receiver's trie holds what comes, and matches find it. Works over any process group that carries the
caches' device: NCCL for GPUs, gloo for tensors on the host.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lmdeploy.pytorch.paging.block_trie import Node

from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager

__all__ = ["receive_prefix", "send_prefix"]


def send_prefix(
    kv: KVManager,
    cache: Any,
    tokens: Sequence[int],
    peer: int,
    adapter: str | None = None,
    group: Any = None,
) -> int:
    """Send what the trie holds of a prefix and the peer lacks; the number of blocks sent.

    Blocks on the host come back to the device first; where there is no room, the prefix ends.

    Args:
        kv: of this worker.
        cache: its `CacheEngine`.
        tokens: the prefix.
        peer: rank of the receiver, which calls `receive_prefix` with the same tokens.
        adapter: whose KV it is.
        group: the process group.
    """
    nodes = _nodes(kv, tokens, adapter)
    here = len(nodes)
    for at, node in enumerate(nodes):
        if not kv.on_device(node.block) and not (kv.make_room(1) and kv.restore([node.block])):
            here = at
            break
    blocks = np.array([node.block for node in nodes[:here]], dtype=np.int64)
    allocator = kv.blocks.allocator
    allocator.add_ref_count(blocks, 1)  # so that nothing evicts them meanwhile
    try:
        count = torch.tensor([here])
        dist.send(_on_wire(count, cache), peer, group)
        first = _on_wire(count, cache)
        dist.recv(first, peer, group)
        wanted = blocks[min(int(first), here) :]
        if len(wanted):
            cache.migrate_blocks(allocator.get_physical_blocks(wanted), peer, group=group)
        return len(wanted)
    finally:
        allocator.free(blocks)


def receive_prefix(
    kv: KVManager,
    cache: Any,
    tokens: Sequence[int],
    peer: int,
    adapter: str | None = None,
    group: Any = None,
) -> int:
    """Take what the peer's `send_prefix` has of a prefix and this worker lacks; the number of blocks.

    Cached blocks give way; where there is no room, nothing is taken. Arguments as of `send_prefix`.
    """
    nodes = _nodes(kv, tokens, adapter)
    known = len(nodes)
    held = np.array([node.block for node in nodes], dtype=np.int64)
    allocator, size = kv.blocks.allocator, kv.trie.block_size
    allocator.add_ref_count(held, 1)  # so that making room does not drop what it follows
    try:
        theirs = _on_wire(torch.tensor([0]), cache)
        dist.recv(theirs, peer, group)
        count = max(int(theirs) - known, 0)
        if count and not kv.make_room(count):
            count = 0
        first = known if count else int(theirs)
        dist.send(_on_wire(torch.tensor([first]), cache), peer, group)
        if not count:
            return 0
        blocks = allocator.allocate(count, "gpu").copy()
        physical = allocator.get_physical_blocks(blocks)
        cache.migrate_blocks(physical, peer, receive=True, group=group)
    finally:
        allocator.free(held)
    parent = nodes[-1] if nodes else kv.trie.get_root(adapter)
    for at, block in enumerate(blocks.tolist(), known):
        parent = _add(kv, parent, np.asarray(tokens[at * size : (at + 1) * size]), block)
    return count


def _nodes(kv: KVManager, tokens: Sequence[int], adapter: str | None) -> list[Any]:
    """The trie's nodes for the full blocks of a prefix, from its start on."""
    node, size, found = kv.trie.get_root(adapter), kv.trie.block_size, []
    for at in range(0, len(tokens) // size * size, size):
        part = np.asarray(tokens[at : at + size])
        node = node.children.get(_key(part))
        if node is None or not np.array_equal(node.tokens, part):
            break
        found.append(node)
    return found


def _key(part: Any) -> int:
    return hash(("random", tuple(part)))


def _add(kv: KVManager, parent: Any, part: Any, block: int) -> Any:
    """A node for a block that the caller holds once: the trie holds it from here on."""
    kv.trie.leaves.discard(parent)
    node = Node(
        hash_key=_key(part),
        block=block,
        tokens=part,
        num_matched=parent.num_matched + kv.trie.block_size,
    )
    node.parent = parent
    kv.trie.leaves.add(node)
    return node


def _on_wire(count: torch.Tensor, cache: Any) -> torch.Tensor:
    """A number where the caches are."""
    return count.to(cache.full_gpu_cache[0].device)
