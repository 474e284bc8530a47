"""Tile shapes of `attend`, and how many of its programs an SM holds."""

from attrs import frozen

from sagellm_ir.runtime.accel.spec import AttentionSpec

__all__ = ["TILE_ROWS", "Tile", "tile_for"]

TILE_ROWS = (16, 32, 64, 128)
"""Packed query rows of a tile. Up to 32: `mma.sync`; from 64: `wgmma`."""


@frozen
class Tile:
    """A compiled shape. The test of the ahead-of-time build asserts what `ctas` needs."""

    rows: int
    """Packed query rows (BM)."""
    keys: int
    """Keys of one iteration (BN)."""
    warps: int
    stages: int
    """Buffers of the software pipeline."""
    ctas: int
    """Programs one SM of an H100/H200 holds at once."""


# head_dim up to 64, up to 128, 256
_TABLE = {
    16: (Tile(16, 64, 4, 3, 5), Tile(16, 64, 4, 3, 3), Tile(16, 32, 4, 3, 3)),
    32: (Tile(32, 64, 4, 3, 3), Tile(32, 64, 4, 3, 2), Tile(32, 32, 4, 3, 2)),
    64: (Tile(64, 64, 4, 3, 3), Tile(64, 64, 4, 2, 2), Tile(64, 32, 4, 2, 1)),
    128: (Tile(128, 64, 8, 3, 2), Tile(128, 64, 8, 3, 1), Tile(128, 32, 8, 2, 1)),
}


def tile_for(spec: AttentionSpec, rows: int) -> Tile:
    """The smallest tile that holds `rows` packed rows, or the largest tile."""
    size = next((size for size in TILE_ROWS if rows <= size), TILE_ROWS[-1])
    return _TABLE[size][(spec.head_dim > 64) + (spec.head_dim > 128)]
