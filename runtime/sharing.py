"""`SharedTables`: which running requests share which blocks, kept up to date as they come and go."""

from collections.abc import Sequence

from attrs import define, field

from sagellm_ir.lowering.plan import PrefixGroup

__all__ = ["SharedTables", "common", "shared_starts"]

_LONG = 64
"""Blocks of a table that is worth comparing with others."""


@define(eq=False)
class _Node:
    """A run of blocks that stand behind each other in every table that has the first of them."""

    parent: "_Node | None"
    start: int
    """Blocks of the tables before it."""
    blocks: tuple[int, ...]
    rows: dict[str, None]
    """Requests whose tables have it, in the order they came."""
    children: dict[int, "_Node"] = field(factory=dict)
    """By the first block of each."""
    group: PrefixGroup | None = None


class SharedTables:
    """A radix tree of block tables: what counts is how far they agree from their first block on.

    Args:
        block_size: tokens of a block.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._root = _Node(None, 0, (), {})
        self._last: dict[str, _Node] = {}
        self._groups: tuple[PrefixGroup, ...] | None = ()
        self.blocks = 0
        """Blocks in the tree; a shared one counts once."""

    def enter(self, request: str, table: tuple[int, ...]) -> None:
        """A request begins to run; `table` is what it may share."""
        node, at = self._root, 0
        while at < len(table):
            child = node.children.get(table[at])
            if child is None:
                child = _Node(node, at, table[at:], {})
                node.children[table[at]] = child
                self.blocks += len(child.blocks)
            same = common(child.blocks, table[at : at + len(child.blocks)])
            if same < len(child.blocks):
                child = self._split(child, same)
            child.rows[request] = None
            self._change(child)
            node, at = child, at + same
        self._last[request] = node

    def leave(self, request: str) -> None:
        """A request ends."""
        node: _Node | None = self._last.pop(request)
        while node is not None and node.parent is not None:
            above = node.parent
            del node.rows[request]
            self._change(node)
            if not node.rows:
                del above.children[node.blocks[0]]
                self.blocks -= len(node.blocks)
            elif len(node.children) == 1:
                (child,) = node.children.values()
                if len(child.rows) == len(node.rows):
                    child.parent, child.start = above, node.start
                    child.blocks, child.group = node.blocks + child.blocks, None
                    above.children[node.blocks[0]] = child
            node = above

    def groups(self) -> tuple[PrefixGroup, ...]:
        """The prefixes that two or more requests share; an outer one before those nested in it."""
        if self._groups is None:
            found: list[PrefixGroup] = []
            stack = [child for child in self._root.children.values() if len(child.rows) > 1]
            while stack:
                node = stack.pop()
                if node.group is None:
                    start, stop = node.start, node.start + len(node.blocks)
                    node.group = PrefixGroup(
                        start * self._size, stop * self._size, tuple(node.rows)
                    )
                found.append(node.group)
                stack += [child for child in node.children.values() if len(child.rows) > 1]
            self._groups = tuple(found)
        return self._groups

    def _change(self, node: _Node) -> None:
        """The requests of a node changed; nobody sees those of a node that has one only."""
        if node.group is not None or len(node.rows) > 1:
            node.group = self._groups = None

    def _split(self, node: _Node, common: int) -> _Node:
        """Put a node of its first blocks above a node."""
        assert node.parent is not None
        top = _Node(node.parent, node.start, node.blocks[:common], dict(node.rows))
        node.parent.children[node.blocks[0]] = top
        node.parent, node.start, node.blocks = top, node.start + common, node.blocks[common:]
        node.group = self._groups = None
        top.children[node.blocks[0]] = node
        return top


def common(one: tuple[int, ...], two: tuple[int, ...]) -> int:
    """How many leading items of two tables are equal."""
    count = min(len(one), len(two))
    if one[:count] == two[:count]:
        return count
    return next(i for i in range(count) if one[i] != two[i])


def shared_starts(tables: Sequence[tuple[int, ...]]) -> list[int]:
    """How many blocks each table has in common with the one before it, of long ones: most of them often
    are, and need not be looked at again."""
    if max(map(len, tables), default=0) < _LONG:
        return [0] * len(tables)
    shared, before, last = list[int](), tuple[int, ...](), 0
    for blocks in tables:
        # Nearly always as many as last time.
        if blocks[:last] != before[:last] or blocks[last : last + 1] == before[last : last + 1]:
            last = common(before, blocks)
        shared.append(last)
        before = blocks
    return shared
