"""`BatchRows`: what a step says of its rows to the attention, beside LMDeploy's own model inputs.

It travels as `prefix_groups` of patch 0003 (scheduler output, model inputs, attention metadata) and
stays on the host on the way. Imports neither torch nor LMDeploy: worker processes unpickle it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

__all__ = ["BatchRows"]

Ints = NDArray[np.int32]


@frozen(eq=False)
class BatchRows:
    """The rows of one step and the prefixes they share."""

    new: Ints
    """`[rows]` new tokens of each row; 1: decode."""
    total: Ints
    """`[rows]` tokens of each row in the cache when its first forward has run."""
    groups: Ints
    """`[groups, 4]`: first token, end, first row, rows. A forest; rows of a group are adjacent."""

    @classmethod
    def of(
        cls,
        seqs: Sequence[Any],
        is_prefill: bool,
        groups: Sequence[tuple[int, int, int, int]] = (),
        pending: int = 0,
    ) -> "BatchRows":
        """Of LMDeploy's sequences as they are scheduled. All rows of a decode have as many new tokens.

        Args:
            seqs: the rows.
            is_prefill: whether the step prefills.
            groups: see the field.
            pending: tokens of each row that a forward in flight is still to give.
        """
        if is_prefill:
            new = np.array([seq._num_token_ids for seq in seqs], np.int32)
        else:
            new = np.full(len(seqs), seqs[0]._num_token_ids if seqs else 1, np.int32)
        old = np.array([seq._num_history_ids for seq in seqs], np.int32)
        return cls(new, old + new + pending, np.array(groups, np.int32).reshape(-1, 4))

    def padded(self, rows: int) -> tuple[Ints, Ints]:
        """`new` and `total` of a batch filled up with empty rows of one token each."""
        new, total = np.ones(rows, np.int32), np.zeros(rows, np.int32)
        new[: len(self.new)], total[: len(self.total)] = self.new, self.total
        return new, total

    def readable(self) -> list[tuple[int, int, range]]:
        """Groups whose tokens all rows have from before this step, as (start, stop, rows): a forest, too, so
        that what continues a group which is left out is left out with it."""
        history = self.total - self.new
        reached = np.zeros(len(history), np.int32)
        found = []
        for start, stop, first, count in sorted(self.groups.tolist()):
            rows = slice(first, first + count)
            if reached[first] == start and (history[rows] >= stop).all():
                reached[rows] = stop
                found.append((start, stop, range(first, first + count)))
        return found
