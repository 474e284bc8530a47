"""Laws of sharing and placement: whose KV a node may read, and where that must be."""

from collections.abc import Iterator

import numpy as np

from sagellm_ir.arrays import NONE, Ints, places
from sagellm_ir.columns import Columns
from sagellm_ir.nodes import KVFetch, KVNode
from sagellm_ir.target import DEVICE
from sagellm_ir.verify.report import Finding

__all__ = ["LAWS"]


def equal_blocks(c: Columns) -> Iterator[Finding]:
    """KV of another request is read only where the blocks of both are equal, in one namespace.

    Only full blocks have ids, so only they are shared. An id stands for everything before it (law
    `chained_blocks`), so the last shared one tells; and by induction along the prefix chain this
    holds for all ancestors: what a prefix shares was checked at the prefix.
    """
    for operand, until in ((c.prefix, c.start), (c.source, c.stop)):
        # No node is -1, which stands for the last: it takes part only where that is masked.
        users = ((operand != NONE) & (c.request != c.request[operand])).nonzero()[0]
        if not len(users):
            continue
        mine, other, tokens = c.request[users], c.request[operand[users]], until[users]
        full, rest = np.divmod(tokens, c.graph.target.block_size)
        fits = (full > 0) & (rest == 0) & (full <= np.minimum(c.id_count[mine], c.id_count[other]))
        agree = fits & (c.space[mine] == c.space[other])
        agree[agree] = _same_id(c, mine[agree], other[agree], full[agree] - 1)
        for k in places(~agree):
            why = _disagreement(c, int(mine[k]), int(other[k]), int(tokens[k]))
            yield Finding(
                f"%{c.names[users[k]]} shares %{c.names[operand[users[k]]]}, but {why}",
                int(users[k]),
            )


def _same_id(c: Columns, one: Ints, two: Ints, block: Ints) -> list[bool]:
    """Whether pairs of requests have the same id for a block that both have."""
    requests = c.graph.requests
    rows = zip(one.tolist(), two.tolist(), block.tolist(), strict=True)
    return [requests[i].blocks[k] == requests[j].blocks[k] for i, j, k in rows]


def _disagreement(c: Columns, one: int, two: int, tokens: int) -> str:
    """Why two requests may not share their first tokens."""
    mine, other = c.graph.requests[one], c.graph.requests[two]
    if mine.adapter != other.adapter or mine.tenant != other.tenant:
        return f"@{mine.id} and @{other.id} are of different adapters or tenants"
    full, rest = divmod(tokens, c.graph.target.block_size)
    if rest:
        return f"only full blocks are shared, and {tokens} is inside a block"
    ours, theirs = mine.blocks[:full], other.blocks[:full]
    if min(len(ours), len(theirs)) < full:
        return f"the prompts of @{mine.id} and @{other.id} do not both have {full} full blocks"
    at = next((k for k in range(full) if ours[k] != theirs[k]), full)
    if at == full:
        return "it shares no block"
    return f"@{mine.id} and @{other.id} differ in block {at} ({ours[at]} and {theirs[at]})"


def prefix_on_device(c: Columns) -> Iterator[Finding]:
    """What a node reads as its prefix is on the device."""
    for i in places((c.prefix != NONE) & (c.tier[c.prefix] != c.device)):
        prefix = c.nodes[c.prefix[i]]
        assert isinstance(prefix, KVNode)
        yield Finding(
            f"the prefix %{prefix.name} is on tier {prefix.tier!r}, not on the device",
            i,
            help="bring it back with a kv_fetch",
        )


def prefix_on_worker(c: Columns) -> Iterator[Finding]:
    """What a node reads as its prefix is on its own worker."""
    for i in places((c.prefix != NONE) & (c.worker[c.prefix] != c.worker)):
        prefix = c.nodes[c.prefix[i]]
        yield Finding(
            f"%{c.names[i]} is on {_worker(c, i)}, but its prefix %{prefix.name} "
            f"is on {_worker(c, int(c.prefix[i]))}",
            i,
            help="copy it over with a kv_migrate {to = device}",
        )


def _worker(c: Columns, i: int) -> str:
    return f"worker {c.nodes[i].worker!r}" if c.nodes[i].worker else "no worker"


def fetch_sources(c: Columns) -> Iterator[Finding]:
    """A fetch reads a lower tier of its own worker, and its source is there."""
    for i in places(c.is_fetch & (c.source != NONE)):
        node, source = c.nodes[i], c.nodes[c.source[i]]
        assert isinstance(node, KVFetch)
        assert isinstance(source, KVNode)
        if node.src == DEVICE:
            yield Finding("a fetch from the device has no source: it pins cached blocks", i)
        elif source.tier != node.src:
            yield Finding(
                f"the source %{source.name} is on tier {source.tier!r}, not on {node.src!r}", i
            )
        elif source.worker != node.worker:
            yield Finding(
                f"the source %{source.name} is on {_worker(c, int(c.source[i]))}, "
                f"the fetch on {_worker(c, i)}",
                i,
            )


def migrates_move(c: Columns) -> Iterator[Finding]:
    """A migrate goes to another tier of its worker, or from one worker's device to another's."""
    moves = np.flatnonzero(c.is_migrate)
    if not len(moves):
        return
    source = c.source[moves]
    to_device = c.tier[moves] == c.device
    same_worker = c.worker[moves] == c.worker[source]
    across = (c.tier[source] == c.device) & ~same_worker
    down = (c.tier[source] != c.tier[moves]) & same_worker
    for k in places(~np.where(to_device, across, down)):
        i, source_node = int(moves[k]), c.nodes[source[k]]
        assert isinstance(source_node, KVNode)
        wanted = "the device of another worker" if to_device[k] else "another tier of its worker"
        yield Finding(
            f"a kv_migrate to {c.graph.target.tiers[c.tier[i]].name!r} copies from {wanted}, but "
            f"%{source_node.name} is on tier {source_node.tier!r} of {_worker(c, int(source[k]))}",
            i,
        )


def cached_blocks(c: Columns) -> Iterator[Finding]:
    """A fetch without a source takes full blocks that the engine's cache holds."""
    hits = np.flatnonzero(c.is_fetch & (c.source == NONE))
    if not len(hits):
        return
    size = c.graph.target.block_size
    held = _held(c)
    for i in hits.tolist():
        node = c.nodes[i]
        assert isinstance(node, KVFetch)
        blocks = c.graph.requests[c.request[i]].blocks
        first, last = node.start // size, node.stop // size
        if node.start % size or node.stop % size or last > len(blocks):
            yield Finding(
                f"[{node.start}:{node.stop}] is not made of full blocks of the prompt of "
                f"@{node.request}: a cache holds no others",
                i,
            )
            continue
        wanted = blocks[first:last]
        places = [
            cached
            for (tier, worker), cached in held.items()
            if tier == node.src and (node.worker is None or worker in (None, node.worker))
        ]
        if not any(cached.issuperset(wanted) for cached in places):
            missing = next(
                (block for block in wanted if not any(block in cached for cached in places)),
                wanted[0],
            )
            where = f" of worker {node.worker!r}" if node.worker else ""
            yield Finding(
                f"block {missing} of @{node.request} is not in the cache of tier {node.src!r}{where}",
                i,
                help="give the value to copy as an operand, or add a cache line",
            )


def _held(c: Columns) -> dict[tuple[str, str | None], set[int]]:
    """Cached blocks by tier and worker; what is on every worker is held on each."""
    held: dict[tuple[str, str | None], set[int]] = {}
    for line in c.graph.cache:
        held.setdefault((line.tier, line.worker), set()).update(line.blocks)
    for (tier, worker), blocks in held.items():
        if worker is not None:
            blocks |= held.get((tier, None), set())
    return held


LAWS = (
    equal_blocks,
    prefix_on_device,
    prefix_on_worker,
    fetch_sources,
    migrates_move,
    cached_blocks,
)
