"""What a block of KV *is*: chain hashes of its tokens, and small numbers that stand for them.

A block's identity is the hash of its parent's identity and its own tokens, so equal identities
mean equal prefixes (a hash chain: R. Merkle, CRYPTO 1987). The first parent is the namespace, so
that model, adapter and tenant never share. The hash is BLAKE2b (RFC 7693): a tenant cannot make up
tokens that collide with another's.
"""

from collections.abc import Container, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from itertools import count
from typing import TypeVar

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.request import TracePrompt

__all__ = ["DIGEST_SIZE", "BlockIds", "Namespace", "chain_hashes"]

DIGEST_SIZE = 16
"""Bytes of a block's identity: 128 bits leave collisions out of reach by chance or by work."""

K = TypeVar("K")

_hash = partial(blake2b, digest_size=DIGEST_SIZE)


@frozen
class Namespace:
    """Within one namespace equal tokens have equal KV; between two, nothing is shared."""

    model: str
    adapter: str | None = None
    tenant: str | None = None

    @cached_property
    def digest(self) -> bytes:
        """The parent of every first block. Lengths come first, so no two namespaces agree."""
        state = _hash()
        for part in (self.model, self.adapter, self.tenant):
            text = b"" if part is None else part.encode()
            state.update((-1 if part is None else len(text)).to_bytes(8, "little", signed=True))
            state.update(text)
        return state.digest()


def chain_hashes(tokens: Sequence[int], block_size: int, namespace: Namespace) -> list[bytes]:
    """One digest of `DIGEST_SIZE` bytes for each full block of `block_size` tokens.

    The same on every machine and in every run: tokens are hashed as little-endian uint32.

    Raises:
        ValueError: a token is not in `[0, 2**32)`.
    """
    return _chain(namespace.digest, _full_blocks(tokens, block_size), block_size)


def _full_blocks(tokens: Sequence[int], block_size: int) -> NDArray[np.uint32]:
    """The tokens of the full blocks, as they are hashed."""
    full = len(tokens) // block_size * block_size
    try:
        array = np.asarray(tokens[:full], dtype=np.int64)
    except OverflowError:
        array = np.array([-1])
    if full and (array.min() < 0 or array.max() >= 1 << 32):
        raise ValueError("token ids must be from 0 to 2**32 - 1")
    return array.astype("<u4")


def _chain(parent: bytes, tokens: NDArray[np.uint32], block_size: int) -> list[bytes]:
    """The digests of the blocks that follow a parent."""
    data = memoryview(tokens.tobytes())
    width = 4 * block_size
    digests = []
    for start in range(0, len(data), width):
        state = _hash(parent)
        state.update(data[start : start + width])
        parent = state.digest()
        digests.append(parent)
    return digests


class _Lately:
    """The last prompt of each of a few first blocks, so that a shared prefix is hashed once.

    Comparing tokens is some hundred times as fast as hashing them.
    """

    MOST = 64
    """First blocks to remember."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._prompts: dict[bytes, tuple[NDArray[np.uint32], list[bytes]]] = {}

    def chain(self, tokens: NDArray[np.uint32], namespace: Namespace) -> list[bytes]:
        """`chain_hashes` of full blocks."""
        if not len(tokens):
            return []
        [first] = digests = _chain(namespace.digest, tokens[: self._size], self._size)
        if (seen := self._prompts.pop(first, None)) is not None:
            digests = seen[1][: self._common(tokens, seen[0])]
        digests = digests + _chain(digests[-1], tokens[len(digests) * self._size :], self._size)
        self._prompts[first] = tokens, digests
        if len(self._prompts) > self.MOST:
            del self._prompts[next(iter(self._prompts))]
        return digests

    def _common(self, a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
        """How many leading blocks are equal."""
        shorter = min(len(a), len(b))
        differ = a[:shorter] != b[:shorter]
        return int(differ.argmax() if differ.any() else shorter) // self._size


class BlockIds:
    """Numbers blocks 0, 1, 2, ... in the order they are first seen.

    Two blocks get one number exactly when their chain hashes are equal or, for traces, when the
    trace gave them one id in one namespace. Keep one `BlockIds` as long as numbers must mean the
    same, for example over all calls of an online planner.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._fresh = count()
        self._lately = _Lately(block_size)
        self._digests: dict[bytes, int] = {}
        self._traces: dict[tuple[Namespace, int], dict[int, int]] = {}

    def __len__(self) -> int:
        """Blocks known by their tokens."""
        return len(self._digests)

    def keep(self, numbers: Container[int]) -> None:
        """Forget the blocks of all other numbers; they get new ones when they are seen again."""
        self._digests = {d: n for d, n in self._digests.items() if n in numbers}

    def _number(self, table: dict[K, int], keys: Sequence[K]) -> tuple[int, ...]:
        """The numbers of `keys`; new ones get the next. Runs in C but for one test a key."""
        table.update(zip([key for key in keys if key not in table], self._fresh, strict=False))
        return tuple(map(table.__getitem__, keys))

    def of_digest(self, digest: bytes) -> int:
        """The id of the block with this chain hash, for example one that an engine reports."""
        return self._number(self._digests, [digest])[0]

    def of_tokens(self, tokens: Sequence[int], namespace: Namespace) -> tuple[int, ...]:
        """The ids of the full blocks of a prompt.

        Raises:
            ValueError: a token is not in `[0, 2**32)`.
        """
        return self.of_prompt(tokens, namespace)[0]

    def of_prompt(
        self, tokens: Sequence[int], namespace: Namespace
    ) -> tuple[tuple[int, ...], bytes]:
        """`of_tokens`, and what `of_rest` needs to go on behind the last full block."""
        digests = self._lately.chain(_full_blocks(tokens, self.block_size), namespace)
        return self._number(self._digests, digests), digests[-1] if digests else namespace.digest

    def of_rest(self, before: bytes, tokens: Sequence[int]) -> tuple[int, ...]:
        """The ids of the full blocks of tokens that stand behind the full blocks of a prompt.

        Raises:
            ValueError: a token is not in `[0, 2**32)`.
        """
        blocks = _full_blocks(tokens, self.block_size)
        return self._number(self._digests, _chain(before, blocks, self.block_size))

    def of_trace(self, prompt: TracePrompt, namespace: Namespace) -> tuple[int, ...]:
        """The ids of the full blocks of a trace's prompt.

        A trace's id names the whole prefix up to its block's end. So larger blocks are named by
        their last trace block, and smaller ones by their trace block and the place in it. Blocks
        that the trace says nothing about are new ones: nobody shares them.

        Raises:
            SageIRError: neither block size is a multiple of the other.
        """
        size, given = self.block_size, prompt.block_size
        if size % given and given % size:
            message = f"the trace has blocks of {given} tokens, the target blocks of {size}"
            help_ = f"choose a block_size that divides {given} or is a multiple of it"
            raise SageIRError(Diagnostic(message, help=help_))
        full = prompt.length // size
        keys: Sequence[int] = prompt.blocks
        if size > given:
            keys = keys[size // given - 1 :: size // given]
        elif size < given:
            parts = range(given // size)
            keys = [block * len(parts) + part for block in keys for part in parts]
        table = self._traces.setdefault((namespace, given), {})
        known = self._number(table, keys[:full])
        return known + tuple(next(self._fresh) for _ in range(full - len(known)))
