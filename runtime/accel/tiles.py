"""Tile shapes of `attend`, and how many of its programs an SM holds."""

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from sagellm_ir.runtime.accel.spec import AttentionSpec


__all__ = ["Tile", "tile_for", "tile_heights", "without_roles"]


@frozen
class Tile:
    """A compiled shape. The ahead-of-time build in the tests proves `registers` and `ctas`."""

    rows: int
    """Packed query rows (BM). Up to 32: `mma.sync`; from 64: `wgmma`."""
    keys: int
    """Keys of one iteration (BN)."""
    warps: int
    stages: int
    """Of the software pipeline."""
    registers: int
    """Per thread, at most; nothing is spilled in the loops over keys."""
    ctas: int
    """Programs that one SM of an H100 or H200 holds at once."""
    beside: int = 0
    """Registers per thread of the shared kernel, at most, in its plainest form: so few that a
    program with 16 private rows fits beside it. 0: as `registers`."""
    wide: bool = False
    """Runs `kernels.attend_wide` on a device: `warps` compute half of the rows each, and one copies."""

    @property
    def all_warps(self) -> int:
        """Warps of a program."""
        return 3 * self.warps if self.wide else self.warps

    def limit(self, spec: "AttentionSpec", *, shared: bool) -> int:
        """Registers per thread, at most, of one of the two kernels."""
        plain = spec.head_dim == 128 and spec.kv != "fp8" and spec.block_size % self.keys == 0
        return self.beside if shared and plain and self.beside else self.registers


_NARROW = (  # head_dim <= 64
    Tile(16, 64, 4, 4, 168, 3),
    Tile(32, 64, 4, 3, 168, 3),
    Tile(64, 64, 4, 3, 255, 2),
    Tile(128, 64, 8, 3, 255, 1),
)
_MIDDLE = (
    Tile(16, 32, 4, 3, 128, 4),
    Tile(32, 64, 4, 3, 255, 2),
    Tile(64, 64, 4, 2, 255, 2),
    Tile(128, 64, 8, 3, 255, 1, beside=168),
)
# For more addresses or masks in the loop: columns that are padded (head_dim 80 and 96), or pages
# shorter than a tile of keys whose elements are converted.
_ROOMY = Tile(16, 64, 4, 3, 255, 2)
# A byte of cache becomes two in registers on its way to the tensor cores: shorter tiles.
_MIDDLE_INT8 = (
    Tile(16, 64, 4, 4, 168, 3),
    Tile(32, 64, 4, 3, 255, 2),
    Tile(64, 32, 4, 3, 255, 2),
    Tile(128, 32, 8, 3, 255, 1, beside=168),
)
_WARPS_APART = Tile(128, 128, 4, 3, 168, 1, wide=True)
"""For attention without extras on Hopper, and pages of 64 tokens: half a tile of keys."""
_NARROW_PLAIN = (*_NARROW[:3], _WARPS_APART)
_MIDDLE_PLAIN = (Tile(16, 32, 2, 3, 255, 4), *_MIDDLE[1:3], _WARPS_APART)
"""Two warps meet less often than four, which tells where an SM has several programs."""
_MIDDLE_ALONE = (*_MIDDLE[:3], _WARPS_APART)
"""With one KV head a batch has few programs: four warps were faster there, by 1 % on average and up to 7 %."""
_WIDE = (  # head_dim 256
    Tile(16, 32, 4, 3, 255, 2),
    Tile(32, 32, 4, 3, 255, 2),
    Tile(64, 32, 8, 3, 255, 1),
)


def _tiles(spec: "AttentionSpec") -> tuple[Tile, ...]:
    if spec.head_dim > 128:
        return _WIDE if spec.kv == "native" else _WIDE[:2]
    extras = spec.kv != "native" or spec.window or spec.softcap or spec.sinks
    if spec.hopper and spec.block_size == 64 and not extras and spec.head_dim in (64, 128):
        if spec.head_dim == 64:
            return _NARROW_PLAIN
        return _MIDDLE_PLAIN if spec.kv_heads > 1 else _MIDDLE_ALONE
    if spec.head_dim <= 64:
        return _NARROW
    padded = spec.head_dim < 128
    tiles = _MIDDLE_INT8 if spec.kv == "int8" else _MIDDLE
    roomy = padded or (spec.kv == "fp8" and spec.block_size < 64)
    return (_ROOMY, *tiles[1:]) if roomy else tiles


def without_roles(spec: "AttentionSpec") -> Tile:
    """What stands in for the tile of `attend_wide` where that cannot run."""
    return (_NARROW if spec.head_dim == 64 else _MIDDLE)[3]


def tile_heights(spec: "AttentionSpec") -> tuple[int, ...]:
    """The tile heights there are, ascending."""
    return tuple(tile.rows for tile in _tiles(spec))


def tile_for(spec: "AttentionSpec", rows: int) -> Tile:
    """The smallest tile that holds `rows` packed rows, or else the largest tile."""
    tiles = _tiles(spec)
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])
