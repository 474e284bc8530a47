"""Rows of a step that share a prefix, side by side, so that a kernel reads the prefix once for all."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from operator import is_
from typing import Any

from sagellm_ir.lowering.plan import PlanStep, PrefixGroup

__all__ = ["Agreed", "Grouped", "RowOrder", "group_rows"]

Agreed = dict[tuple[int, int, bytes], set[str]]
"""By range of tokens and its blocks: the rows that were seen to hold them."""
Grouped = tuple[list[Any], list[tuple[int, int, int, int]]]
"""Rows, and their groups as (first token, end, first row, rows)."""


class RowOrder:
    """The order of the rows of each step; looks anew only at what has changed since the last decode."""

    def __init__(self) -> None:
        self._agreed: Agreed = {}
        """Of the last decode step, while no sequence has lost its blocks."""
        self._last: tuple[Sequence[Any], object] = ([], None)
        """Rows and groups of the last decode step."""
        self._found: Grouped = ([], [])
        """What came of them."""

    def forget(self) -> None:
        """Blocks were given out anew."""
        self._agreed.clear()
        self.release()

    def release(self) -> None:
        """Hold no sequence any more: some have gone, and should not be freed in a decision."""
        self._last, self._found = ([], None), ([], [])

    def of(self, step: PlanStep, names: Sequence[str], rows: Sequence[Any]) -> Grouped:
        """The order of a step's rows; see `group_rows`."""
        before, groups = self._last
        if step.groups is groups and len(rows) == len(before) and all(map(is_, rows, before)):
            return self._found
        here = dict(zip(names, rows, strict=True))
        found = group_rows(here, step.groups, self._agreed if step.decode else {})
        if step.decode:
            self._last, self._found = (rows, step.groups), found
        return found


def group_rows(here: Mapping[str, Any], groups: Iterable[PrefixGroup], agreed: Agreed) -> Grouped:
    """Order rows so that every group's are adjacent.

    A group whose rows do not hold equal blocks, or of which fewer than two rows are left, is left
    out: the kernel reads one row's blocks for all.

    Args:
        here: the step's sequences by request.
        groups: the plan's.
        agreed: rows that need no second look; becomes those of this step.
    """
    kept, checked = list[tuple[PrefixGroup, list[str]]](), dict(agreed)
    agreed.clear()
    for group in sorted(groups, key=lambda group: (group.start, group.stop)):
        members = [name for name in group.requests if name in here]
        if len(members) < 2 or (blocks := _blocks(here[members[0]], group)) is None:
            continue
        key = group.start, group.stop, blocks
        known = checked.get(key) or set[str]()
        if all(_blocks(here[name], group) == blocks for name in members if name not in known):
            agreed[key] = set(members)
            kept.append((group, members))
    if not kept:
        return [*here.values()], []
    if any(group.start for group, _ in kept):
        order = _nested(here, kept)
        row = {name: at for at, name in enumerate(order)}
        firsts = [min([row[name] for name in members]) for _, members in kept]
    else:  # none is inside another
        order = list(dict.fromkeys(chain(*[members for _, members in kept], here)))
        firsts = list(accumulate([len(members) for _, members in kept[:-1]], initial=0))
    table = [
        (group.start, group.stop, first, len(members))
        for (group, members), first in zip(kept, firsts, strict=True)
    ]
    return list(map(here.__getitem__, order)), table


def _nested(here: Mapping[str, Any], kept: Sequence[tuple[PrefixGroup, list[str]]]) -> list[str]:
    """The rows, those of each group next to each other. Groups are a forest, outermost first."""
    places: dict[str, list[int]] = {name: [] for name in here}
    for place, (_, members) in enumerate(kept):
        for name in members:
            places[name].append(place)
    return sorted(here, key=lambda name: places[name] or [len(kept)])


def _blocks(seq: Any, group: PrefixGroup) -> bytes | None:
    """The blocks of a group's range in a row's table; None: they are not full, or not there."""
    size, table = seq.block_size, seq.logical_blocks
    if group.start % size or group.stop % size or table._num_real * size < group.stop:
        return None
    blocks: bytes = table._blocks[group.start // size : group.stop // size].tobytes()
    return blocks
