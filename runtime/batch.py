"""`Batch`: the requests that decode, whatever fragment they came from."""

from collections.abc import Iterable

from sagellm_ir.cost import CostModel
from sagellm_ir.lowering.plan import Collective, PrefillChunk, PrefixGroup
from sagellm_ir.runtime.sharing import SharedTables
from sagellm_ir.target import Target

__all__ = ["Batch"]


class Batch:
    """Rows that decode in every step that has decodes. Who comes or goes costs as much as it shares.

    Args:
        target: one worker.
        outlast: whether a step may go on when the first of its answers has ended.
    """

    def __init__(self, target: Target, outlast: bool) -> None:
        self._target, self._outlast = target, outlast
        self._cost = CostModel(target)
        self._tables = SharedTables(target.block_size)
        self._coming: dict[str, tuple[int, ...]] = {}
        """The tables of rows that have entered since somebody asked what is shared."""
        self._gone: list[str] = []
        """Rows that have left since then, of those that were there."""
        self._forwards = 0
        """So far, of all steps."""
        self._ends: dict[str, int] = {}
        """By row: the forward after which it has its planned tokens."""
        self._base: dict[str, int] = {}
        """By row: its tokens before the first of all forwards, had it been there."""
        self._context = 0
        """The sum of those."""
        self._entered: dict[str, int] = {}
        """By row: the blocks it may share."""
        self._shareable = 0
        self._names: tuple[str, ...] | None = ()

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, name: object) -> bool:
        return name in self._ends

    @property
    def names(self) -> tuple[str, ...]:
        """The rows, in the order they came."""
        if self._names is None:
            self._names = tuple(self._ends)
        return self._names

    def enter(self, name: str, known: int, left: int, table: tuple[int, ...]) -> None:
        """A request decodes from the next step on.

        Args:
            name: of the request.
            known: its tokens so far; all but the newest are in its KV.
            left: tokens to decode, at least one.
            table: the blocks that it may share.
        """
        self._ends[name] = self._forwards + left
        self._base[name] = known - self._forwards
        self._context += known - self._forwards
        self._entered[name] = len(table)
        self._shareable += len(table)
        self._coming[name] = table
        self._names = None

    def leave(self, name: str) -> None:
        """A request decodes no more."""
        del self._ends[name]
        self._context -= self._base.pop(name)
        self._shareable -= self._entered.pop(name)
        if self._coming.pop(name, None) is None:
            self._gone.append(name)
        self._names = None

    def loops(self) -> int:
        """Forwards of a step of decodes alone."""
        most, ends = self._target.max_loops, self._ends.values()
        if not self._outlast:
            return min(most, min(ends) - self._forwards)
        whole = self._forwards + most
        # The rows that came last are the likeliest to go on for so long.
        if any(end >= whole for end in reversed(ends)):
            return most
        return max(ends) - self._forwards

    def run(self, loops: int) -> dict[str, int]:
        """All rows advance; those that have their planned tokens leave.

        Returns the rows that left, and how many of the forwards each ran for nothing.
        """
        self._forwards += loops
        now = self._forwards
        ended = {name: now - end for name, end in self._ends.items() if end <= now}
        for name in ended:
            self.leave(name)
        return ended

    def groups(self, chunks: Iterable[tuple[str, tuple[int, ...]]] = ()) -> tuple[PrefixGroup, ...]:
        """The prefixes that the rows share, with each other and with some chunks.

        Args:
            chunks: requests with a chunk in the step, and their full blocks before it.
        """
        tables, names = self._shared(), []
        for name, table in chunks:
            tables.enter(name, table)
            names.append(name)
        groups = tables.groups()
        for name in names:
            tables.leave(name)
        return groups

    def _shared(self) -> SharedTables:
        for name in self._gone:
            self._tables.leave(name)
        self._gone.clear()
        for name, table in self._coming.items():
            self._tables.enter(name, table)
        self._coming.clear()
        return self._tables

    def seconds(self, loops: int, chunks: Iterable[PrefillChunk] = (), ends: int = 0) -> float:
        """Predicted time of a step.

        Args:
            loops: its forwards. Attention grows by a key a row in each; the middle one counts.
            chunks: its prefills.
            ends: how many of them end their prompts.
        """
        rows = tokens = len(self._ends)
        grown = rows * (loops - 1) // 2
        pairs = self._context + rows * self._forwards + grown
        read = pairs - (self._shareable - self._shared().blocks) * self._target.block_size
        for chunk in chunks:
            start, stop = chunk.start, chunk.stop
            tokens += stop - start
            pairs += (stop - start) * (start + stop + 1) // 2
            read += start
        return round(loops * self._cost.forward(tokens, pairs, read, rows + ends), 9)

    def sums(self, like: tuple[Collective, ...], rows: int) -> tuple[Collective, ...]:
        """The collectives of a forward over so many rows.

        Args:
            like: those of another forward, that tell group, calls and fusion.
            rows: tokens of the forward.
        """
        model = self._target.model
        kinds = dict.fromkeys((item.group, item.calls, item.fused) for item in like)
        payload = rows * model.hidden * model.dtype_bytes
        return tuple(Collective(group, payload, calls, fused) for group, calls, fused in kinds)
