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

__all__ = ["Counts", "Division", "Pieces", "divide"]

Counts = NDArray[np.int64]

_ALONE = 1.47
"""Arithmetic of the tiles without what `Gate.flops` has of starts and ends, as a multiple of it."""
_ENOUGH = 0.8
"""The part of the SMs that draws as much from memory as all of them."""
_START = 5e-6
"""Seconds until the tiles have started."""
_ROUND = 3e-6
"""Seconds that one more item of a program costs."""
_MERGED = 1e12
"""Partials that are written and merged, bytes/s."""
_UNEVEN = 0.1
"""What the kernel that ends first takes from the other one, as a part of its own time."""
_SHORTEST = 256
"""Keys of a piece: shorter ones cost more in partials than they gain."""
_ROUNDS = np.arange(1, 7)[:, None]


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
class Division:
    """The best one found."""

    seconds: float
    """Of a layer."""
    chunk: int
    """Keys of a piece."""
    programs: int
    """SMs for the nodes, one program each."""


def divide(
    spec: "AttentionSpec",
    gate: "Gate",
    tile: "Tile",
    pieces: Pieces,
    sms: int,
    shared: int,
    private: int,
) -> Division | None:
    """The length of the pieces and the SMs with which the slower of the two kernels ends first.

    As many SMs as do the pieces in whole rounds. None: no length has so many pieces.

    Args:
        tile: a tile that takes a whole SM.
        shared: keys of all nodes.
        private: keys of all private parts.
    """
    of_sm = gate.bandwidth / (sms * _ENOUGH)
    shared_bytes, private_bytes = shared * spec.token_bytes, private * spec.token_bytes
    programs = -(-pieces.items // _ROUNDS)
    flops = 4.0 * tile.rows * spec.head_dim * _ROUNDS * pieces.sizes
    reading = shared_bytes / np.minimum(gate.bandwidth, programs * of_sm)
    start = _START + (_ROUNDS - 1) * _ROUND
    nodes = start + np.maximum(flops * sms / (gate.flops * _ALONE), reading)
    rate = np.minimum(gate.bandwidth, np.maximum(sms - programs, 0) * of_sm)
    left = np.maximum(private_bytes - rate * nodes, 0.0)
    alone = np.where(left > 0.0, nodes + left / gate.bandwidth, private_bytes / (rate + 1.0))
    memory = start + (shared_bytes + private_bytes) / gate.bandwidth
    seconds = np.maximum(np.maximum(nodes, alone), memory) + _UNEVEN * np.minimum(nodes, alone)
    seconds += pieces.parts * (spec.kv_heads * (spec.head_dim + 1) * 4) / _MERGED
    good = pieces.fits & (pieces.sizes >= _SHORTEST)
    good = good & (programs <= sms) & (programs * 6 >= sms)
    seconds = np.where(good, seconds, np.inf)
    at = int(seconds.argmin())
    if not good.flat[at]:
        return None
    chunk = int(pieces.sizes[at % len(pieces.sizes)])
    return Division(float(seconds.flat[at]), chunk, int(programs.flat[at]))
