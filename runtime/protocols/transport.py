"""`KVChunk`: KV on its way between engines; `TransportEngine`: what carries it."""

import json
import struct
from hashlib import blake2b
from typing import Protocol, runtime_checkable

from attrs import evolve, field, frozen, validators

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.protocols.kv_schema import KVCacheSchema
from sagellm_ir.runtime.protocols.serial import from_json, to_json

__all__ = ["MAX_CHUNK_BYTES", "KVChunk", "TransportEngine"]

_MAGIC = b"SAGEKV01"
_LENGTHS = struct.Struct("<8sIQ32s")
"""Magic, bytes of the header, bytes of the data, BLAKE2b of the data."""
_MOST_HEADER = 1 << 20
MAX_CHUNK_BYTES = 1 << 32
"""The longest data that is read."""


@frozen
class KVChunk:
    """The first blocks of one request's KV, complete: no other chunk is needed to go on from it.

    On the wire: 8 bytes `SAGEKV01`, the lengths of header and data (uint32, uint64, little-endian),
    32 bytes BLAKE2b of the data, the header (this type's JSON with empty data), the data.
    """

    request: str
    """Whose KV it is; a receiver may file it under another request that begins alike."""
    schema: KVCacheSchema
    """How the data is stored; engines exchange chunks of one schema."""
    tokens: int = field(validator=validators.gt(0))
    """Tokens held, from the request's first; the last block may hold fewer than it could."""
    identities: tuple[str, ...]
    """What each block's KV is of, in hex: the chain hash of a full block (`sagellm_ir/identity.py`),
    namespace included; of a last block that is not full, the hash of all tokens as one block."""
    data: bytes = field(repr=False)
    """Block after block, each of `schema.block_bytes`: the codes as (layers, 2, kv_heads,
    block_size, head_dim), keys first, then, for `token_head` scales, the scales as (layers, 2,
    kv_heads, block_size) float32. Little-endian."""

    def __attrs_post_init__(self) -> None:
        if len(self.data) not in (0, self.blocks * self.schema.block_bytes):
            raise ValueError(
                f"'data' {len(self.data)} bytes; {self.tokens} tokens are {self.blocks} blocks of "
                f"{self.schema.block_bytes}"
            )
        if len(self.identities) != self.blocks:
            raise ValueError(f"'identities' {len(self.identities)} for {self.blocks} blocks")

    @property
    def blocks(self) -> int:
        """Blocks of the chunk."""
        return -(-self.tokens // self.schema.block_size)

    def to_bytes(self) -> bytes:
        """The chunk as it goes over a wire."""
        header = json.dumps(json.loads(to_json(evolve(self, data=b"")))).encode()
        digest = blake2b(self.data, digest_size=32).digest()
        lengths = _LENGTHS.pack(_MAGIC, len(header), len(self.data), digest)
        return b"".join((lengths, header, self.data))

    @classmethod
    def from_bytes(cls, wire: bytes) -> "KVChunk":
        """Reads what `to_bytes` wrote.

        Raises:
            SageIRError: it is cut off, damaged, too long, or no chunk.
        """
        if len(wire) < _LENGTHS.size:
            raise _broken("it is cut off")
        magic, header, size, digest = _LENGTHS.unpack_from(wire)
        if magic != _MAGIC:
            raise _broken("it does not begin as one")
        if header > _MOST_HEADER or size > MAX_CHUNK_BYTES:
            raise _broken("it is too long")
        start = _LENGTHS.size + header
        if len(wire) != start + size:
            raise _broken(f"expected {start + size} bytes, got {len(wire)}")
        data = wire[start:]
        if blake2b(data, digest_size=32).digest() != digest:
            raise _broken("its data is damaged")
        made = from_json(cls, wire[_LENGTHS.size : start], "<KV chunk>")
        if not data:
            raise _broken("it has no data")
        try:
            return evolve(made, data=data)
        except ValueError as error:
            raise _broken(str(error)) from None


@runtime_checkable
class TransportEngine(Protocol):
    """One end of a way between engines. Chunks from one sender arrive in order, whole or not at all."""

    def send(self, chunk: KVChunk, to: str) -> None:
        """Hand a chunk over.

        Raises:
            SageIRError: there is no such end, or it did not take the chunk in time.
        """
        ...

    def receive(self, sender: str) -> KVChunk:
        """The next chunk from a sender; waits for it.

        Raises:
            SageIRError: none came in time, or what came is no chunk.
        """
        ...


def _broken(reason: str) -> SageIRError:
    return SageIRError(Diagnostic(f"what was received is no KV chunk: {reason}"))
