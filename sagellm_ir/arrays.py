"""What `Columns` is made of: arrays of numbers, where `NONE` stands for nothing, and edges."""

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NONE", "Edges", "Ints", "Mask", "first_places", "grouped", "ints", "joined", "places"]

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NONE = -1
"""Stands for no node, request, worker, tier or step."""


def ints(values: Iterable[Any], count: int = -1) -> Ints:
    """Numbers as an array; knowing the count, numpy need not grow it."""
    return np.fromiter(values, np.int64, count)


def joined(parts: list[Ints]) -> Ints:
    """Arrays one behind the other, also of none."""
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def first_places(ids: Ints) -> Ints:
    """For each of some ids >= 0, where it stands first. Ids are usually small: a table is enough."""
    if not len(ids) or int(ids.max()) < 8 * len(ids):
        table = np.zeros(int(ids.max(initial=0)) + 1, dtype=np.int64)
        table[ids[::-1]] = np.arange(len(ids) - 1, -1, -1)
        return table[ids]
    _, first, which = np.unique(ids, return_index=True, return_inverse=True)
    return first[which]


def places(mask: Mask) -> list[int]:
    """Where a mask is true. Of a short one, in a third of the time of `np.flatnonzero`."""
    found: list[int] = mask.nonzero()[0].tolist()
    return found


def grouped(values: Ints, keys: Ints, count: int) -> list[list[int]]:
    """For each key below `count`, the values that have it, in their order. Keys without values have
    one empty list in common."""
    flat = values[np.argsort(keys, kind="stable")].tolist()
    groups, nothing, stop = [], list[int](), 0
    for size in np.bincount(keys, minlength=count).tolist():
        groups.append(flat[stop : stop + size] if size else nothing)
        stop += size
    return groups


class Edges:
    """Edges from nodes to the nodes they name.

    Names are looked up as they are read: what is named stands mostly just before, so that its
    place in the index is still in the processor's cache.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._counts: list[Ints] = []
        self._targets: list[Ints] = []

    def read(self, lists: Sequence[tuple[str, ...]], index: dict[str, int]) -> None:
        """Takes what the next nodes name."""
        names = list(chain.from_iterable(lists))
        if not names:
            self._counts.append(np.zeros(len(lists), np.int64))
            return
        self.names += names
        self._counts.append(ints(map(len, lists), len(lists)))
        self._targets.append(ints(map(index.get, names, repeat(NONE)), len(names)))

    def close(self, index: dict[str, int]) -> None:
        """All nodes are read: looks up what was named before it stood in the index."""
        self.count = joined(self._counts)
        """For each node, how many names it gives."""
        self.start = np.cumsum(self.count) - self.count
        """For each node, its first edge, if it has one."""
        self.user = np.repeat(np.arange(len(self.count)), self.count)
        self.target = joined(self._targets)
        """For each edge, the node it names; `NONE` when there is no such node."""
        for edge in np.flatnonzero(self.target == NONE).tolist():
            self.target[edge] = index.get(self.names[edge], NONE)
        self._counts.clear()
        self._targets.clear()

    def nth(self, nodes: Mask, place: Ints | int) -> Ints:
        """What some nodes name at some place of their list; `NONE` for the other nodes."""
        found: Ints = np.full(len(nodes), NONE, dtype=np.int64)
        found[nodes] = self.target[(self.start + place)[nodes]]
        return found
