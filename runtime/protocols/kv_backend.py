"""`KVBackendProtocol`: the KV memory of one worker."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from sagellm_ir.runtime.protocols.kv_schema import KVCacheSchema

__all__ = ["KVBackendProtocol"]


@runtime_checkable
class KVBackendProtocol(Protocol):
    """KV memory in tiers of blocks. It decides nothing: plans say which block is used for what."""

    @property
    def schema(self) -> KVCacheSchema:
        """How blocks are stored, in every tier."""
        ...

    @property
    def capacity(self) -> dict[str, int]:
        """Blocks of each tier."""
        ...

    def copy_within(self, tier: str, src: Sequence[int], to_tier: str, dst: Sequence[int]) -> None:
        """Copy blocks, `src[i]` to `dst[i]`, between tiers or inside one.

        Raises:
            SageIRError: no such tier or block.
        """
        ...

    def read(self, tier: str, blocks: Sequence[int]) -> bytes:
        """The bytes of blocks, laid out as `KVChunk.data`.

        Raises:
            SageIRError: no such tier or block.
        """
        ...

    def write(self, tier: str, blocks: Sequence[int], data: bytes) -> None:
        """Fill blocks with what `read` gave.

        Raises:
            SageIRError: no such tier or block, or not the bytes of so many blocks.
        """
        ...
