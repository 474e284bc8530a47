"""`GroupCheck`: whether the prefix groups of each step are a forest and tell the truth."""

from collections.abc import Mapping, Sequence
from operator import attrgetter

from sagellm_ir.lowering.memory import Memory
from sagellm_ir.lowering.plan import PrefixGroup

__all__ = ["GroupCheck"]


class GroupCheck:
    """The groups of one worker, step after step. What has not changed is not checked again."""

    def __init__(self, memory: Memory, worker: str) -> None:
        self._memory = memory
        self._changed = memory.changed[worker]
        self._last: tuple[PrefixGroup, ...] = ()

    def check(self, groups: tuple[PrefixGroup, ...], rows: Mapping[str, int | None]) -> None:
        """Note what is wrong with the groups of a step.

        Args:
            groups: those of the step.
            rows: its rows, and from which token on a chunk writes; None for decode rows.
        """
        known = {id(group) for group in self._last}
        inner: dict[str, PrefixGroup] = {}
        for group in sorted(groups, key=attrgetter("start")):
            if id(group) not in known or not self._changed.isdisjoint(group.requests):
                if not self._ready(group, rows):
                    continue
                self._true(group)
            elif not all(map(rows.__contains__, group.requests)):
                self._ready(group, rows)
                continue
            self._nests(group, [inner.get(name) for name in group.requests])
            inner.update(dict.fromkeys(group.requests, group))
        self._last = groups
        self._changed.clear()

    def _ready(self, group: PrefixGroup, rows: Mapping[str, int | None]) -> bool:
        """Whether its members are rows that only read the range; says so if not."""
        error, count = self._memory.error, len(set(group.requests))
        if not 0 <= group.start < group.stop or not len(group.requests) == count > 1:
            error(f"{_span(group)} of {count} rows")
            return False
        for name in group.requests:
            if name not in rows:
                error(f"{_span(group)} holds {name!r}, which is no row of the step")
                return False
            begin = rows[name]
            if begin is None:
                begin = self._memory.states[name].written
            if begin < group.stop:
                error(f"{_span(group)} reaches into what {name!r} writes, from {begin} on")
                return False
        return True

    def _true(self, group: PrefixGroup) -> None:
        """Each member's KV for the range is the same blocks."""
        size, states = self._memory.size, self._memory.states
        first, stop = group.start // size, -(-group.stop // size)
        blocks = states[group.requests[0]].table[first:stop]
        if any(states[name].table[first:stop] != blocks for name in group.requests):
            self._memory.error(f"the tables of {_span(group)} differ")

    def _nests(self, group: PrefixGroup, outer: Sequence[PrefixGroup | None]) -> None:
        """All members come from one group, which ends where this one starts."""
        around = outer[0]
        stop = around.stop if around else 0
        if group.start == stop and outer.count(around) == len(outer):
            return
        if any(other is not None and other.stop > group.start for other in outer):
            self._memory.error(f"{_span(group)} overlaps another group")
        else:
            self._memory.error(f"{_span(group)} nests in no group")


def _span(group: PrefixGroup) -> str:
    return f"group [{group.start}:{group.stop})"
