"""The law of copies that meet inside a block."""

from collections.abc import Iterator

import numpy as np

from sagellm_ir.arrays import NONE
from sagellm_ir.columns import Columns
from sagellm_ir.verify.report import Finding

__all__ = ["LAWS"]


def whole_blocks_copied(c: Columns) -> Iterator[Finding]:
    """A block is copied with all that copies of later parts rely on.

    A block belongs to the node that begins it, and only that node's moves copy it. So a move that
    starts inside a block brings the rest of that block only if the block was copied after the
    rest was written: a move of the block's owner runs after the forward that wrote it.
    """
    size = c.graph.target.block_size
    inside = (c.is_fetch | c.is_migrate) & (c.prefix != NONE) & (c.start % size != 0)
    for i in np.flatnonzero(inside).tolist():
        writer, wanted = _original(c, i), _owner(c, i)
        home, copy = _owner(c, writer), NONE
        while wanted not in (home, NONE):
            copy, wanted = wanted, int(c.source[wanted])
        if wanted == NONE:
            yield Finding(
                f"%{c.names[i]} starts inside a block (at {c.start[i]}, blocks of {size}), and "
                f"%{c.names[_owner(c, i)]}, which begins that block, is no copy of "
                f"%{c.names[home]}, where %{c.names[writer]} wrote the rest of it",
                i,
                help=f"copy %{c.names[home]} too, and give that copy as the prefix",
            )
        elif copy != NONE and not _runs_after(c, copy, writer):
            yield Finding(
                f"%{c.names[copy]} may copy a block before %{c.names[writer]} has written the part "
                f"of it that %{c.names[i]} relies on",
                copy,
                help=f"let %{c.names[copy]} run after %{c.names[writer]}",
            )


def _original(c: Columns, i: int) -> int:
    """What a move copies, through moves of moves."""
    while c.source[i] != NONE:
        i = int(c.source[i])
    return i


def _owner(c: Columns, i: int) -> int:
    """The node that begins the block in which node `i` starts: itself or one of its prefixes."""
    size = c.graph.target.block_size
    begin = c.start[i] // size * size
    while c.start[i] > begin and c.prefix[i] != NONE:
        i = int(c.prefix[i])
    return i


def _runs_after(c: Columns, i: int, j: int) -> bool:
    """Whether move `i` runs after forward `j`: by their steps, or by edges before there are any."""
    if c.graph.stage == "scheduled":
        return bool(c.step[i] > c.finish[j])
    seen, stack = {i}, [i]
    while stack:
        at = stack.pop()
        for edges in (c.operands, c.after):
            first = edges.start[at]
            for other in edges.target[first : first + edges.count[at]].tolist():
                # nodes stand after what they name
                if other >= j and other not in seen:
                    seen.add(other)
                    stack.append(other)
    return j in seen


LAWS = (whole_blocks_copied,)
