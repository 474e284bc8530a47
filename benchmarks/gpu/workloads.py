"""The rows of the attention benchmark: batches of sequences and what they share."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from attrs import frozen

from sagellm_ir.runtime.accel import AttentionSpec, SharedPrefix
from sagellm_ir.runtime.accel.spec import BLOCK_SIZES, HEAD_DIMS, KV_FORMATS

__all__ = [
    "HEADS",
    "K",
    "Workload",
    "correctness",
    "decode",
    "extend",
    "prefill",
    "smoke",
    "trees",
]

HEADS = {"llama-3-8b": (32, 8), "qwen2.5-7b": (28, 4), "70b-tp8": (8, 1), "mha": (32, 32)}
"""Query and KV heads; head_dim 128."""
K = 1024


@frozen
class Workload:
    """A row of the table."""

    name: str
    spec: AttentionSpec
    q_lens: Sequence[int]
    kv_lens: Sequence[int]
    groups: Sequence[SharedPrefix]

    @property
    def pairs(self) -> int:
        """Query-key pairs of a head."""
        return sum(
            new * total - new * (new - 1) // 2
            for new, total in zip(self.q_lens, self.kv_lens, strict=True)
        )

    @property
    def phases(self) -> list[tuple[float, float]]:
        """(bytes, FLOPs) of the shared and of the private keys, each key read once."""
        spec = self.spec
        shared_keys = sum(group.stop - group.start for group in self.groups)
        shared_pairs = sum(
            (group.stop - group.start) * self.q_lens[row]
            for group in self.groups
            for row in group.rows
        )
        reach = [0] * len(self.q_lens)
        for group in self.groups:
            for row in group.rows:
                reach[row] = max(reach[row], group.stop)
        private = sum(self.kv_lens) - sum(reach)
        rows = 2 * sum(self.q_lens) * spec.heads * spec.head_dim * spec.dtype.itemsize
        flops = 4.0 * spec.heads * spec.head_dim
        return [
            (shared_keys * spec.token_bytes, shared_pairs * flops),
            (private * spec.token_bytes + rows, (self.pairs - shared_pairs) * flops),
        ]


def _one_prefix(
    name: str, spec: AttentionSpec, prefix: int, batch: int, suffix: int, new: int = 1
) -> Workload:
    groups = [SharedPrefix(0, prefix, range(batch))] if prefix and batch > 1 else []
    return Workload(name, spec, [new] * batch, [prefix + suffix + new] * batch, groups)


QUICK = (
    *((0, batch, suffix) for batch, suffix in ((8, 1), (64, 1), (256, 1), (1, 32), (8, 32))),
    *((1, batch, suffix) for batch, suffix in ((8, 0.125), (32, 0.125), (256, 0.125))),
    *((4, batch, suffix) for batch, suffix in ((8, 0.125), (32, 0.125), (64, 1), (256, 0.125))),
    *((32, batch, suffix) for batch, suffix in ((1, 0.125), (8, 0.125), (32, 0.125), (64, 1))),
    *((32, 128, 0.125), (32, 256, 0.125), (32, 256, 1), (128, 8, 1), (128, 64, 0.125)),
)
"""Prefix, batch and suffix of the short grid; lengths in 1024 tokens."""
FULL = (
    *((0, batch, suffix) for batch in (1, 8, 32, 64, 256) for suffix in (0.125, 1, 2)),
    *itertools.product((1, 4, 16, 32, 128), (1, 8, 32, 64, 256), (0, 0.125, 1, 2)),
)


def decode(heads: str, quick: bool) -> Iterator[Workload]:
    """One prefix for all, one new token each."""
    spec = AttentionSpec(*HEADS[heads], 128, 64)
    for prefix, batch, suffix in QUICK if quick else FULL:
        sizes = int(prefix * K), batch, int(suffix * K)
        name = f"{heads} decode P={sizes[0]} B={batch} S={sizes[2]}"
        yield _one_prefix(name, spec, *sizes)


def trees(heads: str) -> Iterator[Workload]:
    """Several levels, several groups of different size, parallel sampling; and nothing shared by
    sequences of 100 to 16K tokens."""
    spec = AttentionSpec(*HEADS[heads], 128, 64)
    kv_lens = [100 + row * row * 7919 % 2000 + 14 * K * (row % 16 == 5) for row in range(64)]
    yield Workload(f"{heads} ragged, nothing shared", spec, [1] * 64, kv_lens, ())
    level = [SharedPrefix(0, 4 * K, range(64))]
    level += [SharedPrefix(4 * K, 12 * K, range(at, at + 8)) for at in range(0, 64, 8)]
    kv_lens = [12 * K + 200 + row for row in range(64)]
    yield Workload(
        f"{heads} few-shot 4K + 8 documents 8K + question", spec, [1] * 64, kv_lens, level
    )
    sampling = [SharedPrefix(0, 2 * K, range(at, at + 16)) for at in range(0, 128, 16)]
    yield Workload(
        f"{heads} 8 prompts x 16 samples", spec, [1] * 128, [2 * K + 500] * 128, sampling
    )
    sizes, at, mixed = (3, 5, 8, 17, 31), 0, []
    for size in sizes:
        mixed.append(SharedPrefix(0, size * K, range(at, at + size)))
        at += size
    kv_lens = [size * K + 77 for size in sizes for _ in range(size)] + [3000] * 8
    yield Workload(f"{heads} 5 groups of 3 to 31, 8 alone", spec, [1] * (at + 8), kv_lens, mixed)


def extend(heads: str, quick: bool) -> Iterator[Workload]:
    """New tokens on a cached prefix; 4 are a draft to be verified."""
    spec = AttentionSpec(*HEADS[heads], 128, 64)
    sizes: Iterable[tuple[int, int, int]] = itertools.product(
        (8, 32), (4, 16, 64, 128, 512), (1, 8, 32)
    )
    if quick:
        sizes = ((8, 4, 8), (8, 128, 8), (8, 512, 1), (32, 16, 32), (32, 128, 8))
    for prefix, new, batch in sizes:
        name = f"{heads} extend P={prefix * K} B={batch} T={new}"
        yield _one_prefix(name, spec, prefix * K, batch, 0, new)


def prefill(heads: str) -> Iterator[Workload]:
    """A chunk of one long prompt, on what the cache has of it."""
    spec = AttentionSpec(*HEADS[heads], 128, 64)
    for prefix, new in itertools.product((0, 8, 24), (2, 8)):
        name = f"{heads} prefill P={prefix * K} T={new * K}"
        yield _one_prefix(name, spec, prefix * K, 1, 0, new * K)


def correctness(thorough: bool) -> Iterator[Workload]:
    """Ragged lengths, two levels, an empty row; on every tile height, cache format and feature.

    `thorough`: with every head_dim and block size, some 500 kernels to compile.
    """
    rows = (((28, 4), 1), ((32, 8), 4), ((8, 1), 2), ((4, 4), 40))
    shapes = [(128, 64, "native"), (64, 16, "native"), (128, 32, "int8"), (128, 64, "fp8")]
    if thorough:
        shapes = [*itertools.product(HEAD_DIMS, BLOCK_SIZES, KV_FORMATS)]
    for head_dim, block, kv in shapes:
        for heads, new in rows:
            yield _ragged(AttentionSpec(*heads, head_dim, block, kv=kv), new, 24, 1024)
    features: list[dict[str, Any]]
    features = [{"window": 300}, {"softcap": 20.0}, {"sinks": True}, {"dtype": torch.float16}]
    for extras in features:
        spec = AttentionSpec(28, 4, 128, 64, **extras)
        yield _ragged(spec, 1, 24, 1024)
        yield _ragged(spec, 7, 5, 1024)
    for heads in HEADS.values():
        for new, batch in ((1, 150), (300, 6)):
            yield _ragged(AttentionSpec(*heads, 128, 64), new, batch, 1024)


def smoke() -> Iterator[Workload]:
    """Small enough for Triton's interpreter."""
    yield _ragged(AttentionSpec(7, 1, 64, 16), 1, 5, 64)
    yield _ragged(AttentionSpec(2, 2, 64, 64, kv="int8"), 3, 3, 64)
    yield _one_prefix("smoke", AttentionSpec(4, 2, 64, 16), 64, 2, 5)


def _ragged(spec: AttentionSpec, new: int, batch: int, prefix: int) -> Workload:
    """A prefix of all but two rows, another below it for some, and one row without keys."""
    q_lens = [new + row % 3 if new > 1 else 1 for row in range(batch)]
    kv_lens = [2 * prefix + 37 * row + q_lens[row] for row in range(batch)]
    kv_lens[-1], q_lens[-1] = 0, 1
    groups = [SharedPrefix(0, prefix, range(batch - 2))]
    groups.append(SharedPrefix(prefix, 2 * prefix, range(0, batch - 2, 2)))
    return Workload(f"ragged {spec}", spec, q_lens, kv_lens, groups)
