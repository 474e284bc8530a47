"""`SharedRows`: which rows of a step share which prefixes, kept up to date as rows come and go.

The KV nodes form a forest by prefix. A node under which two active branches meet is the deepest
KV that its rows share: it makes one `PrefixGroup`, which reaches up to the next such node. A
change costs O(depth of the row's chain), not O(rows).
"""

from bisect import bisect_left
from collections.abc import Sequence
from operator import attrgetter

from sagellm_ir.lowering.plan import PrefixGroup

__all__ = ["SharedRows"]

NONE = -1


class SharedRows:
    """The forest of active rows.

    Args:
        parent: for each node, the index of its prefix, or -1.
        stop: for each node, where its KV ends.
        span: for each node, the tokens it owns.
    """

    def __init__(self, parent: Sequence[int], stop: Sequence[int], span: Sequence[int]) -> None:
        self._parent, self._stop, self._span = parent, stop, span
        self.kv_tokens = 0
        """Tokens that the prefixes of active rows hold; what is shared counts once."""
        self._branches: dict[int, int] = {}
        """For each node: its active children; and their indexes (rows: -2 - row) by XOR, so
        that an only child is known."""
        self._child: dict[int, int] = {}
        self._rows: dict[int, tuple[list[int], list[str]]] = {}
        """Meeting nodes: their rows in order, and the rows' requests."""
        self._above: dict[int, int] = {}
        """Meeting nodes: the next meeting node above."""
        self._built: dict[int, PrefixGroup] = {}
        self._groups: tuple[PrefixGroup, ...] | None = ()
        self._name: dict[int, str] = {}

    @property
    def groups(self) -> tuple[PrefixGroup, ...]:
        """The groups now; an outer group stands before those nested in it."""
        if self._groups is None:
            for node, (_, names) in self._rows.items():
                if node not in self._built:
                    above = self._above[node]
                    start = 0 if above == NONE else self._stop[above]
                    self._built[node] = PrefixGroup(start, self._stop[node], tuple(names))
            self._groups = tuple(sorted(self._built.values(), key=attrgetter("start", "stop")))
        return self._groups

    def enter(self, node: int, row: int, name: str) -> None:
        """A row whose last node is `node` becomes active; rows are ordered by `row`."""
        parent, branches, child, rows = self._parent, self._branches, self._child, self._rows
        self._name[row] = name
        below, at, climbing = -2 - row, parent[node], True
        while at != NONE:
            if climbing:
                count = branches[at] = branches.get(at, 0) + 1
                child[at] = child.get(at, 0) ^ below
                if count == 1:
                    self.kv_tokens += self._span[at]
                else:
                    climbing = False
                    if count == 2:
                        self._meet(at, child[at] ^ below)
            if at in rows:
                order, names = rows[at]
                place = bisect_left(order, row)
                order.insert(place, row)
                names.insert(place, name)
                self._built.pop(at, None)
                self._groups = None
            below, at = at, parent[at]

    def leave(self, node: int, row: int) -> None:
        """The active row `row`, which entered at `node`, ends."""
        parent, branches, child, rows = self._parent, self._branches, self._child, self._rows
        below, at, climbing = -2 - row, parent[node], True
        while at != NONE:
            if at in rows:
                order, names = rows[at]
                place = bisect_left(order, row)
                del order[place], names[place]
                self._built.pop(at, None)
                self._groups = None
            if climbing:
                count = branches[at] = branches[at] - 1
                child[at] ^= below
                if count == 0:
                    self.kv_tokens -= self._span[at]
                    del branches[at], child[at]
                else:
                    climbing = False
                    if count == 1:
                        self._part(at)
            below, at = at, parent[at]
        del self._name[row]

    def _meet(self, node: int, other: int) -> None:
        """`node` becomes a meeting node; `other` was its only child until now."""
        below = self._descend(other)
        if below >= 0:
            order, names = self._rows[below]
            self._rows[node] = order.copy(), names.copy()
            self._above[node] = self._above[below]
            self._set_above(below, node)
        else:
            row = -2 - below
            self._rows[node] = [row], [self._name[row]]
            above = self._parent[node]
            while above != NONE and above not in self._rows:
                above = self._parent[above]
            self._above[node] = above

    def _part(self, node: int) -> None:
        """`node` stops being a meeting node: one child is left."""
        below = self._descend(self._child[node])
        if below >= 0:
            self._set_above(below, self._above[node])
        del self._rows[node], self._above[node]

    def _descend(self, node: int) -> int:
        """The first meeting node at or under `node`, or the row (-2 - row) at the end."""
        while node >= 0 and node not in self._rows:
            node = self._child[node]
        return node

    def _set_above(self, node: int, above: int) -> None:
        self._above[node] = above
        self._built.pop(node, None)
