"""Prompts as flat arrays of block ids (`BlockTable`), and as a radix tree (`RadixTree`)."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
from attrs import frozen

from sagellm_ir.graph import RequestDecl

__all__ = ["BlockTable", "Ints", "RadixTree", "ends_run"]

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@frozen(eq=False)
class BlockTable:
    """The prompts' blocks behind each other; entry `i` is a block of request `owner[i]`."""

    requests: Sequence[RequestDecl]
    block_size: int

    @cached_property
    def first(self) -> Ints:
        """Where each request's entries begin, and one past the last entry."""
        counts = np.fromiter((len(request.blocks) for request in self.requests), np.int64)
        return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)

    @cached_property
    def ids(self) -> Ints:
        """Block ids."""
        blocks = chain.from_iterable(request.blocks for request in self.requests)
        return np.fromiter(blocks, np.int64, int(self.first[-1]))

    @cached_property
    def owner(self) -> Ints:
        """The request of each entry."""
        return np.repeat(np.arange(len(self.requests)), np.diff(self.first))

    @cached_property
    def stop(self) -> Ints:
        """The token of its prompt that each entry ends before."""
        place = np.arange(len(self.ids)) - self.first[self.owner]
        return (place + 1) * self.block_size

    @cached_property
    def shareable(self) -> Mask:
        """Entries that a request may take from elsewhere: the last token of a prompt must be
        computed, because the first new token comes out of it."""
        lengths = np.fromiter((request.prompt_len for request in self.requests), np.int64)
        return self.stop < lengths[self.owner]

    def parts(self, entries: Ints) -> dict[str, slice]:
        """Which of some ascending entries belong to which request, for those that have any."""
        edges = np.searchsorted(entries, self.first).tolist()
        spans = zip(self.requests, edges[:-1], edges[1:], strict=True)
        return {request.id: slice(low, high) for request, low, high in spans if low < high}


@frozen(eq=False)
class RadixTree:
    """The boundaries in a radix tree of prompts: where runs of blocks with the same users end.

    The first request with a block leads it; the others follow where they may (`shareable`).
    Boundary `i` comes before `i + 1` in the leaders' prompts.
    """

    table: BlockTable
    number: Ints
    """For each entry of the table, a dense number for its block id."""
    block: Ints
    """For each boundary, the number of the block it lies behind."""
    stop: Ints
    """For each boundary, the tokens above it."""
    parent: Ints
    """For each boundary, the next one above it, or -1."""
    followers: Ints
    """For each boundary, the followers that part from the tree there."""

    @classmethod
    def of(cls, table: BlockTable) -> "RadixTree":
        """The tree of some prompts, by sorting their block ids: an id stands for a whole chain.

        Down a prompt the set of a block's followers only shrinks, so it changes where its size
        does. There is a boundary behind each last block with a set that is not empty.
        """
        ids, lead, number = np.unique(table.ids, return_index=True, return_inverse=True)
        leads = np.zeros(len(table.ids), dtype=bool)
        leads[lead] = True
        follows = table.shareable & ~leads
        size = np.bincount(number[follows], minlength=len(ids))[number]
        last = ends_run(size) | ends_run(table.owner)
        boundary = np.flatnonzero(leads & last & (size > 0))
        index = np.full(len(ids), -1)
        index[number[boundary]] = np.arange(len(boundary))
        behind = np.flatnonzero(index[number] >= 0)
        at = np.searchsorted(behind, boundary)
        above = behind[np.maximum(at - 1, 0)]
        inner = (at > 0) & (table.owner[above] == table.owner[boundary])
        followed = behind[follows[behind]]
        parting = followed[ends_run(table.owner[followed])]
        return cls(
            table,
            number,
            block=number[boundary],
            stop=table.stop[boundary],
            parent=np.where(inner, index[number[above]], -1),
            followers=np.bincount(index[number[parting]], minlength=len(boundary)),
        )

    def cuts(self, boundaries: Sequence[int]) -> dict[str, tuple[list[int], list[int]]]:
        """For each request that has some of these boundaries, the tokens and block numbers they
        lie behind, in ascending order."""
        wanted = np.zeros(len(self.number) + 1, dtype=bool)
        wanted[self.block[boundaries]] = True
        entries = np.flatnonzero(wanted[self.number])
        stops, numbers = self.table.stop[entries].tolist(), self.number[entries].tolist()
        parts = self.table.parts(entries).items()
        return {request: (stops[part], numbers[part]) for request, part in parts}


def ends_run(values: Ints) -> Mask:
    """Where the next value is another one, or there is none."""
    ends = np.ones(len(values), dtype=bool)
    ends[:-1] = values[1:] != values[:-1]
    return ends
