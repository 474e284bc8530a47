"""What a block of KV *is*: chain hashes of its tokens, and small numbers that stand for them.

A block's identity is the hash of its parent's identity and its own tokens, so equal identities
mean equal prefixes (a hash chain: R. Merkle, CRYPTO 1987). The first parent is the namespace, so
that model, adapter and tenant never share. The hash is BLAKE2b (RFC 7693): a tenant cannot make up
tokens that collide with another's.
"""

from collections.abc import Container, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from itertools import count, takewhile
from typing import TypeVar

import numpy as np
from attrs import define, frozen
from numpy.typing import NDArray

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.request import TracePrompt

__all__ = ["DIGEST_SIZE", "BlockIds", "Namespace", "UnreadPrompt", "chain_hashes"]

DIGEST_SIZE = 16
"""Bytes of a block's identity: 128 bits leave collisions out of reach by chance or by work."""

K = TypeVar("K")

_hash = partial(blake2b, digest_size=DIGEST_SIZE)

_RANGE = "token ids must be from 0 to 2**32 - 1"
_LATELY = 64
"""First blocks whose last prompt is remembered."""


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


def _full_blocks(tokens: Sequence[int] | NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """The tokens of the full blocks: of an array a part, not a copy."""
    full = len(tokens) // block_size * block_size
    try:
        array = np.asarray(tokens[:full], dtype=np.int64)
    except OverflowError:
        raise ValueError(_RANGE) from None
    if full and array.view(np.uint64).max() >= 1 << 32:  # negative ones show as large
        raise ValueError(_RANGE)
    return array


def _chain(parent: bytes, tokens: NDArray[np.int64], block_size: int) -> list[bytes]:
    """The digests of the blocks that follow a parent."""
    data = tokens.astype("<u4").tobytes()
    width = 4 * block_size
    digests = []
    for start in range(0, len(data), width):
        parent = blake2b(parent + data[start : start + width], digest_size=DIGEST_SIZE).digest()
        digests.append(parent)
    return digests


@frozen(eq=False)
class UnreadPrompt:
    """A prompt whose blocks have no numbers yet."""

    tokens: NDArray[np.int64]
    """Of its full blocks."""
    parent: bytes
    """Its namespace's digest."""
    start: bytes
    """Equal for two prompts that begin with the same block in one namespace; empty if it has none."""


@define(eq=False)
class _Seen:
    """The full blocks of a prompt."""

    tokens: NDArray[np.int64]
    digests: list[bytes]
    numbers: tuple[int, ...]

    def common(self, tokens: NDArray[np.int64], block_size: int) -> int:
        """How many leading blocks others have in common. Comparing tokens is some hundred times as
        fast as hashing them."""
        shorter = min(len(tokens), len(self.numbers) * block_size)
        differ = tokens[:shorter] != self.tokens[:shorter]
        first = int(differ.argmax()) if shorter else 0
        return (first if shorter and differ[first] else shorter) // block_size


class BlockIds:
    """Numbers blocks 0, 1, 2, ... in the order they are first seen.

    Two blocks get one number exactly when their chain hashes are equal or, for traces, when the
    trace gave them one id in one namespace. Keep one `BlockIds` as long as numbers must mean the
    same, for example over all calls of an online planner.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._fresh = count()
        self._lately: dict[bytes, _Seen] = {}
        """By the first block of each: the last prompt, so that a shared prefix is read once."""
        self._digests: dict[bytes, int] = {}
        self._traces: dict[tuple[Namespace, int], dict[int, int]] = {}

    def __len__(self) -> int:
        """Blocks known by their tokens."""
        return len(self._digests)

    def keep(self, numbers: Container[int]) -> None:
        """Forget the blocks of all other numbers; they get new ones when they are seen again."""
        self._digests = {d: n for d, n in self._digests.items() if n in numbers}
        for seen in self._lately.values():
            known = sum(1 for _ in takewhile(numbers.__contains__, seen.numbers))
            seen.numbers = seen.numbers[:known]

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
        return self.read(self.unread(tokens, namespace))

    def unread(
        self, tokens: Sequence[int] | NDArray[np.int64], namespace: Namespace
    ) -> UnreadPrompt:
        """A prompt to be read later, or not at all.

        Args:
            tokens: all of it. An array is not copied, and is not to change until then.
            namespace: where it is to be shared.

        Raises:
            ValueError: a token is not in `[0, 2**32)`.
        """
        array = _full_blocks(tokens, self.block_size)
        start = namespace.digest + array[: self.block_size].tobytes() if len(array) else b""
        return UnreadPrompt(array, namespace.digest, start)

    def read(self, prompt: UnreadPrompt) -> tuple[tuple[int, ...], bytes]:
        """The ids of the full blocks of a prompt, and what `of_rest` needs to go on behind them."""
        size, tokens = self.block_size, prompt.tokens
        if not len(tokens):
            return (), prompt.parent
        digests, numbers, common = list[bytes](), tuple[int, ...](), 0
        if (seen := self._lately.pop(prompt.start, None)) is not None:
            common = seen.common(tokens, size)
            digests, numbers = seen.digests[:common], seen.numbers[:common]
        parent = digests[-1] if digests else prompt.parent
        digests += _chain(parent, tokens[len(digests) * size :], size)
        numbers += self._number(self._digests, digests[len(numbers) :])
        if seen is None or len(numbers) - common > common // 8:  # else it is as good for the next
            seen = _Seen(tokens.copy(), digests, numbers)
        self._lately[prompt.start] = seen
        if len(self._lately) > _LATELY:
            del self._lately[next(iter(self._lately))]
        return numbers, digests[-1]

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
