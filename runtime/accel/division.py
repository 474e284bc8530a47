"""Which SMs read shared keys while the others read private ones.

Tiles that take whole SMs would keep the private kernel waiting: arithmetic first, then memory. With
the SMs divided, both go on at the same time.
"""

from typing import TYPE_CHECKING

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sagellm_ir.runtime.accel.gate import Gate
    from sagellm_ir.runtime.accel.spec import AttentionSpec
    from sagellm_ir.runtime.accel.tiles import Tile

__all__ = ["Counts", "Division", "Pieces", "Private", "divide"]

Counts = NDArray[np.int64]
Times = NDArray[np.floating]

_ALONE = 1.29
"""Arithmetic of the tiles without what `Gate.flops` has of starts and ends, as a multiple of it."""
_ENOUGH = 0.65
"""The part of the SMs that draws as much from memory as all of them."""
_FIRST = 3e-6
"""Seconds until anything is read."""
_START = 4.5e-6
"""Seconds until the tiles have started."""
_ROUND = 1.5e-6
"""Seconds that one more item of a program of the tiles costs."""
_PRIVATE_START = 4.5e-6
"""Seconds until private programs have started beside the tiles; and those that start after them."""
_WAIT = 1.25e-6
"""Seconds for a tile of `_TILE` private keys, at least: a program waits for them."""
_TILE = 32
_TAIL = 0.8, 0.15
"""What the last private items take longer than the mean, of an item: on few SMs, and when all have joined."""
_MERGED = 0.88e12
"""Partials that are written and merged, bytes/s."""
_MERGE = 3.9e-6
"""Seconds for the merge, and for the kernels that begin and end."""
_SHORTEST = 128
"""Keys of a shared piece: shorter ones cost more in partials than they gain."""
_STEP = 64
"""What pieces of private parts are multiples of, keys."""
_ROUNDS = np.arange(1, 5)[:, None]
_CUTS = np.array([1, 2, 3, 4, 6, 8, 12, 16])[:, None]
"""Numbers of pieces of the longest private part to choose from."""


@frozen(eq=False)
class Pieces:
    """Nodes cut into pieces of at most so many keys, for several lengths."""

    sizes: Counts
    cuts: Counts
    """Pieces of the longest node."""
    items: Counts
    """Work items of all KV heads."""
    parts: Counts
    """Partials of a KV head that are written."""
    fits: NDArray[np.bool_]
    """Whether the buffers hold them."""
    work: float
    """Keys of all items, with any length."""


@frozen
class Private:
    """Private parts that another kernel may read at the same time, on other SMs."""

    keys: int
    """Of all of them."""
    longest: int
    tiles: int
    """Tiles of queries, of one KV head."""
    queries: int
    ctas: int
    """Programs of that kernel that an SM holds."""

    @classmethod
    def of(
        cls, spec: "AttentionSpec", tile: "Tile", new: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> "Private":
        """Those of a batch.

        Args:
            tile: of the private kernel.
            new: `[batch]` new tokens.
            lengths: `[batch]` private keys.
        """
        tiles = -(-new * spec.group // tile.rows) * (lengths > 0)
        sizes = int(lengths.sum()), int(lengths.max(initial=0)), int(tiles.sum()), int(new.sum())
        return cls(*sizes, tile.ctas)


@frozen
class Division:
    """The best one found."""

    seconds: float
    """Of a layer."""
    chunk: int
    """Keys of a shared piece."""
    programs: int
    """SMs for the nodes, one program each."""
    cuts: int
    """Pieces of the longest private part."""


def divide(
    spec: "AttentionSpec",
    gate: "Gate",
    tile: "Tile",
    pieces: Pieces,
    sms: int,
    shared: int,
    private: Private,
) -> Division | None:
    """The pieces of both kinds and the SMs with which a layer takes the least time.

    As many SMs as do the shared pieces in whole rounds. None: no length has so many pieces.

    Args:
        tile: a tile that takes a whole SM.
        shared: keys of all nodes.
    """
    counts = -(-pieces.items // _ROUNDS)
    good = pieces.fits & (pieces.sizes >= _SHORTEST) & (counts <= sms) & (counts * 6 >= sms)
    more, at = np.nonzero(good)
    if not len(at):
        return None
    sizes, programs = pieces.sizes[at], counts[more, at]
    of_sm = gate.bandwidth / (sms * _ENOUGH)
    start = _START + more * _ROUND
    flops = 4.0 * tile.rows * spec.head_dim * (more + 1) * sizes
    shared_bytes = shared * spec.token_bytes
    reading = shared_bytes / np.minimum(gate.bandwidth, programs * of_sm)
    nodes = start + np.maximum(flops * sms / (gate.flops * _ALONE), reading)

    rate = np.minimum(gate.bandwidth, (sms - programs) * of_sm + 1.0)
    grid = (sms - programs) * private.ctas + 1e-3
    items = private.tiles + (_CUTS - 1) * (private.keys / private.longest)
    alone = _private(spec, gate, private, sms, items * spec.kv_heads, nodes, rate, grid)
    memory = _FIRST + (shared_bytes + private.keys * spec.token_bytes) / gate.bandwidth
    parts = pieces.parts[at] + (items / private.tiles - 1) * (private.queries * spec.group)
    seconds = np.maximum(np.maximum(nodes, alone), memory) + _MERGE
    seconds += parts * (spec.kv_heads * (spec.head_dim + 1) * 4) / _MERGED
    cut, best = divmod(int(seconds.argmin()), len(at))
    return Division(
        float(seconds[cut, best]), int(sizes[best]), int(programs[best]), int(_CUTS[cut, 0])
    )


def _private(
    spec: "AttentionSpec",
    gate: "Gate",
    private: Private,
    sms: int,
    items: Times,
    nodes: Times,
    rate: Times,
    grid: Times,
) -> Times:
    """When private parts have been read, seconds, for each number of cuts and each division.

    Args:
        items: private work items.
        nodes: when the nodes have been read, seconds; their SMs then read private parts too.
        rate: what the other SMs draw from memory, bytes/s.
        grid: programs that these hold.
    """
    nbytes = private.keys * spec.token_bytes
    keys = -(-private.longest // (_CUTS * _STEP)) * _STEP
    keys = np.minimum(keys, private.longest)
    wait = -(-keys // _TILE) * _WAIT
    nbytes_of_one = keys * (spec.token_bytes / spec.kv_heads)
    one = np.maximum(nbytes_of_one * grid / rate, wait)
    rounds = items / grid
    tail = _TAIL[0] * one * np.minimum(1.0, 8.0 * np.maximum(rounds - 1.0, 0.0))
    many = np.minimum(np.ceil(rounds) * one, nbytes / rate + tail)
    begun = _PRIVATE_START
    alone = begun + np.where(rounds > 1.0, many, np.maximum(wait, rounds * one))
    left = np.clip((alone - nodes) / (alone - begun), 0.0, 1.0)
    last = _TAIL[1] * nbytes_of_one * (sms * private.ctas) * np.minimum(1.0, left * rounds)
    after = nodes + begun + np.maximum((left * nbytes + last) / gate.bandwidth, wait)
    read: Times = np.where((rounds > 1.0) & (alone > nodes), np.minimum(alone, after), alone)
    return read
