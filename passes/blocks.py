"""Prompts as flat arrays of block ids (`BlockTable`), and as a radix tree (`RadixTree`)."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from attrs import frozen

from sagellm_ir.arrays import Ints, Mask, first_places
from sagellm_ir.columns import Columns

__all__ = ["BlockTable", "Cuts", "RadixTree", "ends_run"]


@frozen(eq=False)
class BlockTable:
    """Prompts' blocks behind each other; entry `i` is a block of the request in place `owner[i]`."""

    columns: Columns
    order: Ints
    """Indexes of the requests, in the order their blocks stand here."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.columns.graph.target.block_size

    @cached_property
    def _as_declared(self) -> bool:
        return bool((self.order == np.arange(len(self.order))).all())

    @cached_property
    def first(self) -> Ints:
        """Where each request's entries begin, and one past the last entry."""
        counts = self.columns.id_count[self.order]
        return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)

    @cached_property
    def ids(self) -> Ints:
        """Block ids."""
        if self._as_declared:
            return self.columns.ids
        shift = self.columns.id_start[self.order] - self.first[:-1]
        ids: Ints = self.columns.ids[np.arange(self.first[-1]) + shift[self.owner]]
        return ids

    @cached_property
    def lead(self) -> Ints:
        """For each entry, the first one with its id."""
        return self.columns.first_id if self._as_declared else first_places(self.ids)

    @cached_property
    def owner(self) -> Ints:
        """The request of each entry."""
        return np.repeat(np.arange(len(self.order)), np.diff(self.first))

    def stops(self, entries: Ints) -> Ints:
        """The tokens of their prompts that some entries end before."""
        return (entries - self.first[self.owner[entries]] + 1) * self.block_size

    @cached_property
    def shareable(self) -> Mask:
        """Entries that a request may take from elsewhere: the last token of a prompt must be
        computed, because the first new token comes out of it."""
        count = np.diff(self.first)
        lengths = self.columns.prompt[self.order]
        whole = (count > 0) & (count * self.block_size >= lengths)
        shareable: Mask = np.ones(len(self.ids), dtype=bool)
        shareable[self.first[1:][whole] - 1] = False
        return shareable

    @cached_property
    def last(self) -> Mask:
        """Entries that are the last of their request."""
        last: Mask = np.zeros(len(self.ids) + 1, dtype=bool)
        last[self.first[1:] - 1] = True
        return last[:-1]

    def parts(self, entries: Ints) -> tuple[list[int], list[int]]:
        """By request, which of some ascending entries are its own: the first, and one past the last."""
        edges = np.searchsorted(entries, self.first)
        low, high = np.empty_like(self.order), np.empty_like(self.order)
        low[self.order], high[self.order] = edges[:-1], edges[1:]
        return low.tolist(), high.tolist()


@frozen(eq=False)
class RadixTree:
    """The boundaries in a radix tree of prompts: where runs of blocks with the same users end.

    The first request with a block leads it; the others follow where they may (`shareable`).
    Boundary `i` comes before `i + 1` in the leaders' prompts.
    """

    table: BlockTable
    behind: Ints
    """The entries of the table that have a boundary behind them."""
    boundary: Ints
    """Which boundary that is, for each of `behind`."""
    stop: Ints
    """For each boundary, the tokens above it."""
    parent: Ints
    """For each boundary, the next one above it, or -1."""
    followers: Ints
    """For each boundary, the followers that part from the tree there."""

    @classmethod
    def of(cls, table: BlockTable) -> "RadixTree":
        """The tree of some prompts: a block id stands for a whole chain, so it tells the node.

        Down a prompt the set of a block's followers only shrinks, so it changes where its size
        does. There is a boundary behind each last block with a set that is not empty.
        """
        lead = table.lead
        follows = table.shareable & (lead != np.arange(len(lead)))
        size = np.bincount(lead[follows], minlength=len(lead))
        # Only leaders' entries have a size here; a leader's blocks that it follows in end before.
        last = np.flatnonzero((size > 0) & (ends_run(size) | table.last))
        index = np.full(len(lead), -1)
        index[last] = np.arange(len(last))
        found = index[lead]
        behind = np.flatnonzero(found >= 0)
        boundary, owner = found[behind], table.owner[behind]
        at = np.searchsorted(behind, last)
        above = np.maximum(at - 1, 0)
        inner = (at > 0) & (owner[above] == owner[at])
        followed = np.flatnonzero(follows[behind])
        parting = followed[ends_run(owner[followed])]
        return cls(
            table,
            behind,
            boundary,
            stop=table.stops(last),
            parent=np.where(inner, boundary[above], -1),
            followers=np.bincount(boundary[parting], minlength=len(last)),
        )

    def cuts(self, boundaries: Sequence[int]) -> "Cuts":
        """Where these boundaries cut the prompts."""
        wanted = np.zeros(len(self.stop), dtype=bool)
        wanted[boundaries] = True
        chosen = wanted[self.boundary]
        entries = self.behind[chosen]
        stops, numbers = self.table.stops(entries).tolist(), self.boundary[chosen].tolist()
        return Cuts(stops, numbers, *self.table.parts(entries))


@frozen(eq=False)
class Cuts:
    """The boundaries in prompts, in ascending order, prompt by prompt."""

    stops: list[int]
    """The tokens each lies behind."""
    boundaries: list[int]
    """Which boundary each is."""
    low: list[int]
    """By request: the first of them in its prompt,"""
    high: list[int]
    """and one past the last."""


def ends_run(values: Ints) -> Mask:
    """Where the next value is another one, or there is none."""
    ends = np.ones(len(values), dtype=bool)
    ends[:-1] = values[1:] != values[:-1]
    return ends
