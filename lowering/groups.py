"""`SharedRows`: which rows of a step share which prefixes, kept up to date as rows come and go.

The KV nodes form a forest by prefix. A node under which two active branches meet is the deepest
KV that its rows share: it makes one `PrefixGroup`, which reaches up to the next such node. A
change costs O(depth of the row's chain), not O(rows); groups that did not change are kept.
"""

from bisect import bisect_left
from collections.abc import Sequence

from sagellm_ir.lowering.plan import PrefixGroup

__all__ = ["SharedRows"]

NONE = -1


class SharedRows:
    """The forest of active rows.

    Args:
        parent: for each node, the index of its prefix, or -1; less than its own.
        stop: for each node, where its KV ends.
        span: for each node, the tokens it owns.
    """

    def __init__(self, parent: Sequence[int], stop: Sequence[int], span: Sequence[int]) -> None:
        self._parent, self._stop, self._span = parent, stop, span
        self.kv_tokens = 0
        """Tokens that the prefixes of active rows hold; what is shared counts once."""
        self._branches = [0] * len(parent)
        """For each node: its active children; and their indexes (rows: -2 - row) by XOR, so
        that an only child is known."""
        self._child = [0] * len(parent)
        self._rows: dict[int, dict[int, str]] = {}
        """Meeting nodes: the requests of their rows, in the order they came."""
        self._above: dict[int, int] = {}
        """Meeting nodes: the next meeting node above."""
        self._order: list[int] = []
        """Meeting nodes by index, so each before those under it; and the group of each."""
        self._built: list[PrefixGroup] = []
        self._stale: set[int] = set()
        """Meeting nodes whose group is not up to date."""
        self._groups: tuple[PrefixGroup, ...] | None = ()
        self._name: dict[int, str] = {}

    @property
    def groups(self) -> tuple[PrefixGroup, ...]:
        """The groups now; an outer group stands before those nested in it."""
        if self._stale:
            for node in self._stale:
                above = self._above[node]
                start = 0 if above == NONE else self._stop[above]
                names = tuple(self._rows[node].values())
                place = bisect_left(self._order, node)
                self._built[place] = PrefixGroup(start, self._stop[node], names)
            self._stale.clear()
            self._groups = None
        if self._groups is None:
            self._groups = tuple(self._built)
        return self._groups

    def enter(self, node: int, row: int, name: str) -> None:
        """A row whose last node is `node` becomes active."""
        parent, branches, child = self._parent, self._branches, self._child
        self._name[row] = name
        below, at = -2 - row, parent[node]
        while at != NONE:
            child[at] ^= below
            branches[at] += 1
            if branches[at] > 1:
                if branches[at] == 2:
                    self._meet(at, child[at] ^ below)
                break
            self.kv_tokens += self._span[at]
            below, at = at, parent[at]
        while at != NONE:
            self._rows[at][row] = name
            self._stale.add(at)
            at = self._above[at]

    def leave(self, node: int, row: int) -> None:
        """The active row `row`, which entered at `node`, ends."""
        parent, branches, child = self._parent, self._branches, self._child
        below, at = -2 - row, parent[node]
        while at != NONE:
            child[at] ^= below
            branches[at] -= 1
            if branches[at]:
                if branches[at] == 1:
                    at = self._part(at)
                break
            self.kv_tokens -= self._span[at]
            below, at = at, parent[at]
        while at != NONE:
            del self._rows[at][row]
            self._stale.add(at)
            at = self._above[at]
        del self._name[row]

    def move(self, old: int, node: int, row: int, name: str) -> None:
        """The active row `row`, which entered at `old`, goes on to `node`: `leave` and `enter`."""
        parent, branches, child = self._parent, self._branches, self._child
        top, at = parent[old], parent[node]
        while at not in (top, NONE) and not branches[at]:
            at = parent[at]
        if at != top:
            self.leave(old, row)
            self.enter(node, row, name)
            return
        # Nobody else is on the way: all that meet the row above still do.
        below, at = -2 - row, parent[node]
        while at != top:
            branches[at], child[at] = 1, below
            self.kv_tokens += self._span[at]
            below, at = at, parent[at]
        if top != NONE:
            child[top] ^= below ^ (-2 - row)

    def _meet(self, node: int, other: int) -> None:
        """`node` becomes a meeting node; `other` was its only child until now."""
        below = self._descend(other)
        if below >= 0:
            self._rows[node] = self._rows[below].copy()
            self._above[node] = self._above[below]
            self._above[below] = node
            self._stale.add(below)
        else:
            row = -2 - below
            self._rows[node] = {row: self._name[row]}
            above = self._parent[node]
            while above != NONE and above not in self._rows:
                above = self._parent[above]
            self._above[node] = above
        place = bisect_left(self._order, node)
        self._order.insert(place, node)
        self._built.insert(place, PrefixGroup(0, 0, ()))
        self._stale.add(node)

    def _part(self, node: int) -> int:
        """`node` stops being a meeting node: one child is left. Returns the one above."""
        above = self._above.pop(node)
        below = self._descend(self._child[node])
        if below >= 0:
            self._above[below] = above
            self._stale.add(below)
        del self._rows[node]
        place = bisect_left(self._order, node)
        del self._order[place], self._built[place]
        self._stale.discard(node)
        self._groups = None
        return above

    def _descend(self, node: int) -> int:
        """The first meeting node at or under `node`, or the row (-2 - row) at the end."""
        while node >= 0 and node not in self._rows:
            node = self._child[node]
        return node
