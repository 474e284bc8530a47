"""Laws of spans: which tokens a node covers, and how spans meet."""

from collections.abc import Iterator

import numpy as np

from sagellm_ir.arrays import NONE, places
from sagellm_ir.columns import Columns
from sagellm_ir.nodes import AllReduce, KVNode
from sagellm_ir.verify.report import Finding

__all__ = ["LAWS"]


def nonempty_spans(c: Columns) -> Iterator[Finding]:
    """A span `[start, stop)` has tokens."""
    for i in places(c.is_kv & ((c.start < 0) | (c.start >= c.stop))):
        yield Finding(f"empty span [{c.start[i]}:{c.stop[i]}]: expected 0 <= start < stop", i)


def spans_inside_requests(c: Columns) -> Iterator[Finding]:
    """Prefills stay in the prompt, decodes in the answer, all KV in the request."""
    if not len(c.prompt):
        return
    prompt, end = c.prompt[c.request], c.end[c.request]
    low = np.where(c.is_decode, prompt, 0)
    high = np.where(c.is_prefill, prompt, end)
    for i in places(c.is_kv & ((c.start < low) | (c.stop > high))):
        node = c.nodes[i]
        assert isinstance(node, KVNode)
        part = "prompt" if c.is_prefill[i] else "answer" if c.is_decode[i] else "tokens"
        yield Finding(
            f"span [{node.start}:{node.stop}] is not inside the {part} "
            f"[{low[i]}:{high[i]}] of @{node.request}",
            i,
        )


def spans_abut(c: Columns) -> Iterator[Finding]:
    """A node starts where its prefix stops; so a prefix chain covers `[0, start)` without gaps."""
    for i in places((c.prefix != NONE) & (c.start != c.stop[c.prefix])):
        prefix = c.nodes[c.prefix[i]]
        yield Finding(
            f"%{c.names[i]} starts at {c.start[i]}, but its prefix %{prefix.name} "
            f"stops at {c.stop[c.prefix[i]]}",
            i,
        )


def one_append(c: Columns) -> Iterator[Finding]:
    """A value that ends inside a block has one node at most that appends to it (alignment law)."""
    size = c.graph.target.block_size
    inside = c.is_forward & (c.prefix != NONE) & (c.start % size != 0)
    users = inside.nonzero()[0]
    prefixes = c.prefix[users]
    values, first = np.unique(prefixes, return_index=True)
    if len(values) == len(users):
        return
    for i in np.delete(users, first).tolist():
        prefix = c.names[c.prefix[i]]
        other = c.names[users[prefixes == c.prefix[i]][0]]
        yield Finding(
            f"%{c.names[i]} and %{other} both append to %{prefix}, "
            f"which ends inside a block (at {c.start[i]}, blocks of {size})",
            i,
            help=f"end %{prefix} at {c.start[i] // size * size}, a block boundary",
        )


def copies_inside_sources(c: Columns) -> Iterator[Finding]:
    """A move copies a part of its source that is cut at block boundaries."""
    size = c.graph.target.block_size
    moves = np.flatnonzero(c.source != NONE)
    if not len(moves):
        return
    start, stop = c.start[moves], c.stop[moves]
    low, high = c.start[c.source[moves]], c.stop[c.source[moves]]
    outside = (start < low) | (stop > high)
    cut = ((start != low) & (start % size != 0)) | ((stop != high) & (stop % size != 0))
    for k in places(outside | cut):
        source = c.names[c.source[moves[k]]]
        why = "is not inside" if outside[k] else f"cuts a block of {size} tokens of"
        yield Finding(
            f"span [{start[k]}:{stop[k]}] {why} the span [{low[k]}:{high[k]}] "
            f"of the source %{source}",
            int(moves[k]),
        )


def sound_collectives(c: Columns) -> Iterator[Finding]:
    """A collective has a payload and is called."""
    for i in places(c.is_allreduce):
        node = c.nodes[i]
        assert isinstance(node, AllReduce)
        if node.bytes < 0 or node.calls < 1:
            yield Finding(
                f"{node.bytes} bytes in {node.calls} calls: expected bytes >= 0 and calls >= 1", i
            )


LAWS = (
    nonempty_spans,
    spans_inside_requests,
    spans_abut,
    one_append,
    copies_inside_sources,
    sound_collectives,
)
