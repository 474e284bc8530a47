"""`Batch`: what runs on one worker, kept up to date from step to step."""

from bisect import bisect_left
from collections.abc import Iterable

from sagellm_ir.cost import CostModel
from sagellm_ir.graph import IRGraph
from sagellm_ir.lowering.flat import FlatGraph
from sagellm_ir.lowering.groups import SharedRows
from sagellm_ir.lowering.plan import Collective, PrefillChunk, PrefixGroup

__all__ = ["Batch"]


class Batch:
    """The decode rows of a worker, the prefixes they share, and the collectives that run.

    A row is the number of its request in the graph.
    """

    def __init__(self, graph: IRGraph, flat: FlatGraph, cost: CostModel) -> None:
        self.shared = SharedRows(flat.parent, flat.stop, flat.span)
        self.reduces: dict[int, Collective] = {}
        self._graph, self._flat, self._cost = graph, flat, cost
        self._context = 0
        """Tokens that the decode rows attend to in the next forward, summed over the rows."""
        self._generated = 0
        """The part of `context` behind the rows' prefixes, nearly: what no row shares."""
        self._chunks: dict[int, int] = {}
        """The rows of the chunks of this step, and the nodes where they entered."""
        self._before: dict[int, int] = {}
        """Those of the step before that have not gone on in this one."""
        self._alone = False
        """Whether nothing runs in this step but one chunk, which is not in the forest."""
        self._left_out = False
        """Whether that is so of `before`."""
        self._order: list[int] = []
        self._names: list[str] = []
        self._decode: tuple[str, ...] | None = ()

    @property
    def decode(self) -> tuple[str, ...]:
        """The decoding requests, in the order of the graph's requests."""
        if self._decode is None:
            self._decode = tuple(self._names)
        return self._decode

    def chunk(self, i: int, row: int) -> None:
        """A request has a chunk in this step, whose first node is `i`."""
        self._chunks[row] = i

    def enter_chunks(self) -> None:
        """All chunks of this step are known. One that is alone shares nothing, so it need not enter
        the forest."""
        self._alone = len(self._chunks) == 1 and not self._order
        if not self._alone:
            self._recall()
            for row, i in self._chunks.items():
                self._enter(i, row)

    def join(self, i: int, row: int) -> None:
        """A request starts decode `i`."""
        flat = self._flat
        self._recall()
        self._enter(i, row)
        place = bisect_left(self._order, row)
        self._order.insert(place, row)
        self._names.insert(place, flat.request[i])
        self._decode = None
        # A row that continues a decode first feeds the last token of that one.
        first = flat.span[i] - flat.forwards[i]
        self._context += flat.start[i] + first
        self._generated += first

    def part(self, i: int, row: int) -> None:
        """Decode `i` has ended."""
        self.shared.leave(i, row)
        place = bisect_left(self._order, row)
        del self._order[place], self._names[place]
        self._decode = None
        self._context -= self._flat.stop[i]
        self._generated -= self._flat.span[i]

    def settle(self) -> None:
        """All chunks and decodes of this step are known: the chunks of the step before end."""
        if not self._left_out:
            for row, i in self._before.items():
                self.shared.leave(i, row)
        self._before, self._chunks, self._left_out = self._chunks, {}, self._alone

    @property
    def groups(self) -> tuple[PrefixGroup, ...]:
        """The prefixes that rows of this step share."""
        return () if self._alone else self.shared.groups

    def _recall(self) -> None:
        """Others come: the chunk that was alone, in the step before or in this one, enters late."""
        if self._left_out:
            self._left_out = False
            for row, i in self._before.items():
                self.shared.enter(i, row, self._graph.requests[row].id)
        if self._alone:
            self._alone = False
            for row, i in self._chunks.items():
                self._enter(i, row)

    def _enter(self, i: int, row: int) -> None:
        name = self._graph.requests[row].id
        before = self._before.pop(row, None)
        if before is None:
            self.shared.enter(i, row, name)
        else:
            self.shared.move(before, i, row, name)

    def run(self, chunks: Iterable[PrefillChunk], loops: int) -> float:
        """Advance the decode rows by `loops` forwards.

        Returns the seconds of these forwards with some chunks; of many, the middle one counts.
        """
        rows = len(self._names)
        grown = rows * (loops - 1) // 2
        tokens = logits = rows
        prefix = self.shared.kv_tokens
        if self._alone:
            (first,), self._alone = self._before.values(), False
            prefix = self._flat.start[first]
        pairs, read = self._context + grown, prefix + self._generated + grown
        for chunk in chunks:
            start, stop = chunk.start, chunk.stop
            tokens += stop - start
            pairs += (stop - start) * (start + stop + 1) // 2
            logits += stop == self._graph.request[chunk.request].prompt_len
        seconds = self._cost.forward(tokens, pairs, read, logits)
        for reduce in self.reduces.values():
            seconds += self._cost.allreduce(reduce.bytes, reduce.calls)
        self._context += loops * rows
        self._generated += loops * rows
        return loops * seconds
