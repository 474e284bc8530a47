"""`Gate`: whether reading a prefix node once for all its sequences pays."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import asdict, frozen

from sagellm_ir.runtime.accel.tiles import tile_for, tile_heights

if TYPE_CHECKING:
    from sagellm_ir.runtime.accel.spec import AttentionSpec

__all__ = ["Fixed", "Gate", "ceil_div"]


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


_RATES = {16: 0.195, 32: 0.3, 64: 0.72}
"""Arithmetic of small tiles, as a share of what tiles of 128 rows do, measured on an H200."""
_READS = {64: 0.95}
"""Bandwidth of tiles, as a share of what the others reach, measured on an H200."""
_STARTS = {16: 3e-6, 32: 3e-6, 128: 4.5e-6}
"""What tiles cost that leave no room on an SM for private programs beside them, seconds, measured on an
H200: the private part then runs after them; and one of 128 rows takes long to start."""

_UNDIVIDED = {64: (11.7e-6, 1.6)}, (16e-6, 0.92)
"""What a layer takes with tiles of some rows, and with the others, whose shared kernel runs on all SMs:
seconds, and how much longer the nodes take beside private parts."""


@frozen(cache_hash=True)
class Gate:
    """A roofline of the two ways to read a node; the faster one is taken.

    The defaults were measured on an H200. `benchmarks/gpu/attention.py` measures the rates of another
    device: its JSON has them as `rates`.
    """

    bandwidth: float = 4.4e12
    """HBM, bytes/s."""
    reread: float = 7.0e12
    """Pages that other programs read at about the same time, from L2, bytes/s."""
    flops: float = 5.6e14
    """Matrix arithmetic of packed tiles of 128 rows, padding included, FLOP/s."""
    launch: float = 1.0e-6
    """What sharing costs a layer before anything is read: a kernel, a merge; seconds."""
    node: float = 0.5e-6
    """What one more node costs: tiles that start and end, partials to merge, seconds."""
    slot: float = 0.05e-6
    """What one more piece of a node's keys costs in the merge, seconds."""
    programs: int = 132
    """SMs: a node with fewer tiles is cut along its keys to fill them."""

    def saved(self, spec: "AttentionSpec", queries: int, sequences: int, tokens: int) -> float:
        """Seconds a layer gains when `sequences` read `tokens` shared tokens together.

        Args:
            queries: query tokens of the sequences, summed.
            sequences: how many read the node.
            tokens: its length.
        """
        private = tile_for(spec, ceil_div(queries, sequences) * spec.group).rows
        tiles = sequences * ceil_div(ceil_div(queries, sequences) * spec.group, private)
        apart = self._read(spec, tiles, private, tokens)
        shared = self.tile_rows(spec, [(queries, tokens)])
        tiles = ceil_div(queries * spec.group, shared)
        together = self._read(spec, tiles, shared, tokens)
        cuts = max(1, min(ceil_div(tokens, 256), self.programs // (tiles * spec.kv_heads)))
        partials = 2 * cuts * queries * spec.heads * (spec.head_dim + 1) * 4
        merge = partials / self.bandwidth + cuts * self.slot
        return apart - together - merge - self.node

    def heights(self, spec: "AttentionSpec") -> tuple[int, ...]:
        """The tile heights to choose from."""
        return tile_heights(spec)

    def of_height(self, rows: int) -> "Gate":
        """This gate, with tiles of one height."""
        return Fixed(**asdict(self), rows=rows)

    def tile_rows(self, spec: "AttentionSpec", nodes: Sequence[tuple[int, int]]) -> int:
        """The tile height with the least time for (queries, tokens) nodes; the smallest of equals."""
        best, least = 0, math.inf
        for rows in self.heights(spec):
            seconds = _STARTS.get(rows, 0.0) + self._nodes(spec, rows, nodes)
            if seconds < least:
                best, least = rows, seconds
        return best

    def undivided(
        self, spec: "AttentionSpec", nodes: Sequence[tuple[int, int]], private: int
    ) -> tuple[float, int]:
        """Seconds of a layer with (queries, tokens) nodes and `private` keys, with the best of the tiles
        that leave the SMs undivided; and the rows of those. None of them: infinite."""
        special, other = _UNDIVIDED
        best, least = 0, math.inf
        for rows in self.heights(spec):
            start, slower = special.get(rows, other)
            seconds = start + slower * self._nodes(spec, rows, nodes)
            if seconds < least and not tile_for(spec, rows).wide:
                best, least = rows, seconds
        return least + private * spec.token_bytes / self.bandwidth, best

    def _nodes(self, spec: "AttentionSpec", rows: int, nodes: Sequence[tuple[int, int]]) -> float:
        """Seconds for tiles of `rows` rows to go over (queries, tokens) nodes."""
        tiles = [(-(-queries * spec.group // rows), tokens) for queries, tokens in nodes]
        return sum(self._read(spec, many, rows, tokens) for many, tokens in tiles)

    def _read(self, spec: "AttentionSpec", tiles: int, rows: int, tokens: int) -> float:
        """Seconds for `tiles` tiles of `rows` rows (in each KV head) to go over `tokens` keys."""
        traffic = tokens * spec.token_bytes * (1 / self.bandwidth + (tiles - 1) / self.reread)
        traffic /= _READS.get(rows, 1.0)
        flops = 4.0 * tiles * rows * spec.kv_heads * spec.head_dim * tokens
        return max(traffic, flops / (self.flops * _RATES.get(rows, 1.0)))


@frozen(cache_hash=True)
class Fixed(Gate):
    """A gate that has tiles of one height."""

    rows: int = 0

    def heights(self, spec: "AttentionSpec") -> tuple[int, ...]:
        """That one."""
        return (self.rows,)
