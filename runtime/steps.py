"""`Steps`: the steps of fragments and of the batch, as what an engine is to do."""

from collections.abc import Callable, Sequence
from itertools import count

from attrs import evolve

from sagellm_ir.graph import RequestDecl
from sagellm_ir.lowering.plan import Bind, Collective, PlanStep, PrefillChunk
from sagellm_ir.runtime.batch import Batch
from sagellm_ir.runtime.fragment import Fragment, Held
from sagellm_ir.runtime.ledger import Ledger
from sagellm_ir.runtime.requests import Job, Requests, Row
from sagellm_ir.runtime.sharing import common, shared_starts
from sagellm_ir.target import DEVICE, Target

__all__ = ["Steps"]


class Steps:
    """What an engine holds and runs, and its next steps.

    Args:
        target: one worker.
        requests: those that are known.
        ledger: what the tiers hold.
        batch: the requests that decode.
    """

    def __init__(self, target: Target, requests: Requests, ledger: Ledger, batch: Batch) -> None:
        self.target, self.requests, self.ledger, self.batch = target, requests, ledger, batch
        self.rows: dict[str, Row] = {}
        """Requests that hold blocks."""
        self.spent: dict[str, None] = {}
        """Requests that the last steps gave all their planned tokens."""
        self.late: set[str] = set()
        """Those of `spent` that the last step's last forward gave them: their seats are taken as
        long as it is in flight."""
        self.fragment: Fragment | None = None
        self.alone = False
        """Whether the last step was one of the batch alone."""
        self.full = False
        """Whether those that wait cannot start until something ends or comes."""
        self.rested = 0.0
        """Predicted seconds since the decodes ran last."""
        self._sums: tuple[Collective, ...] = ()
        """The collectives of some step."""
        self._ended: list[tuple[Job, Row, Sequence[int] | None]] = []
        """What has ended and still holds its blocks, and its tokens if they are known."""
        self._numbers = count()
        """Of the steps that are given out."""

    @property
    def under_way(self) -> list[Job]:
        """Requests that hold blocks and have not finished their prompts."""
        batch, spent = self.batch, self.spent
        if len(self.rows) == len(batch) + len(spent):
            return []
        return [
            row.job for name, row in self.rows.items() if name not in batch and name not in spent
        ]

    def close(self) -> None:
        """Give up what is left of the fragment."""
        if self.fragment is not None:
            self.fragment.close()
            self.fragment = None

    def planned(self) -> PlanStep | None:
        """The fragment's next step; None at the end of its first prefills."""
        fragment = self.fragment
        step = None if fragment is None else fragment.next()
        if fragment is None or step is None:
            self.close()
            return None
        # What has begun to decode has its blocks already.
        fresh = [bind for bind in step.binds if bind.request not in fragment.begun]
        fragment.forget(step.kv)
        if not fragment.fits(step.kv, fresh):
            self.let_go()
        if not fragment.fits(step.kv, fresh):
            self.full = True
            self.close()
            return None
        fragment.position += 1
        self.alone = False
        moves = fragment.moves(step.kv)
        first = self._bind(fragment, fresh)
        ended = [self.rows[chunk.request] for chunk in step.prefill if self._compute(chunk)]
        joined = self._join(step, len(ended))
        fragment.begun.update([row.job.request.id for row in ended])
        self._begin(ended, first)
        if fragment.next() is None:
            # What of it has not started waits for something to end.
            self.full = any(name in self.requests.waiting for name in fragment.decls)
            self.close()
        rows = self.rows
        binds = [Bind(name, at, tuple(rows[name].table[at:])) for name, at in first.items()]
        return evolve(
            joined,
            index=next(self._numbers),
            kv=(*self.ledger.take_changes(), *moves),
            binds=tuple(binds),
        )

    def decode(self) -> PlanStep:
        """The batch runs alone."""
        batch, loops = self.batch, self.batch.loops()
        step = PlanStep(
            next(self._numbers),
            self.target.workers[0].name,
            self.ledger.take_changes(),
            decode=batch.names,
            loops=loops,
            groups=batch.groups(),
            collectives=batch.sums(self._sums, len(batch)),
            cost=batch.seconds(loops),
        )
        ended = batch.run(loops)
        self.spent.update(dict.fromkeys(ended))
        self.late.update(name for name, idle in ended.items() if not idle)
        self.rested, self.alone = 0.0, True
        return step

    def changes(self) -> PlanStep | None:
        """A step without rows, for what the tiers have to do; None if that is nothing."""
        kv = self.ledger.take_changes()
        if not kv:
            return None
        return PlanStep(next(self._numbers), self.target.workers[0].name, kv, loops=0)

    def settle(self, answered: Callable[[str], int | None]) -> None:
        """Requests that have their planned tokens: what is not over is planned again. Those whose
        last token is in flight (None) are left as they are."""
        told = {name: tokens for name in self.spent if (tokens := answered(name)) is not None}
        for name, tokens in told.items():
            row = self.rows[name]
            job = row.job
            job.answered = tokens
            if job.answered < job.request.max_new_tokens:
                size = self.target.block_size
                row.computed = min(job.known - 1, len(row.table) * size)
                used = -(-row.computed // size)
                self.ledger[DEVICE].drop(row.table[used:])
                del row.table[used:]
            else:  # The engine will say that it has ended.
                del self.rows[name]
                self.ledger[DEVICE].drop(row.table)
            del self.spent[name]
        self.late.clear()

    def hold(self, row: Row, decl: RequestDecl) -> Held | None:
        """Let a row under way find its full blocks as cached content; the block it is inside of."""
        device, size = self.ledger[DEVICE], self.target.block_size
        full, inside = divmod(row.computed, size)
        device.write(row.table, decl.blocks[:full])
        return Held(decl.id, row.table[full], row.computed) if inside else None

    def requeue(self, job: Job) -> None:
        """Plan a request anew, from what the cache keeps of it."""
        row = self.rows.pop(job.request.id, None)
        if row is not None:
            self.ledger[DEVICE].drop(row.table)
            self.requests.waiting[job.request.id] = job

    def end(self, job: Job, tokens: Sequence[int] | None) -> None:
        """A request has ended, and gives its seat free; its blocks when they are `let_go`.

        Args:
            job: of the request.
            tokens: prompt and answer, if the full blocks of the answer are to stay cached.
        """
        name = job.request.id
        row = self.rows.pop(name, None)
        if row is not None and name not in self.batch and name not in self.spent:
            # It is computed again, and this far.
            tokens = None if tokens is None else tokens[: row.computed + 1]
        self.spent.pop(name, None)
        self.late.discard(name)
        self.full = False
        planned = self.fragment is not None and name in self.fragment.decls
        if planned and (row is None or row.computed < job.known):
            self.close()
        for shelf in self.ledger.values():
            shelf.forget(job.private)
        if row is None:
            return
        if name in self.batch:
            self.batch.leave(name)
        self._ended.append((job, row, tokens))

    def let_go(self) -> None:
        """What has ended holds its blocks no more; full ones of known answers stay cached."""
        device, size = self.ledger[DEVICE], self.target.block_size
        for job, row, tokens in self._ended:
            if tokens is not None:
                # The newest token has no KV.
                table = row.table[job.request.prompt_len // size :]
                device.write(table, self.requests.answer(job, tokens[:-1]))
            device.drop(row.table)
        self._ended.clear()

    def _bind(self, fragment: Fragment, binds: Sequence[Bind]) -> dict[str, int]:
        """Let tables hold blocks; their requests have rows from here on.

        Returns by request the first index of its table that has changed.
        """
        first: dict[str, int] = {}
        for bind, new in zip(binds, self._hold(fragment, binds), strict=True):
            name, start, same = bind.request, bind.at, 0
            row = self.rows.get(name)
            if row is None:
                row = self.rows[name] = Row(self.requests.waiting.pop(name))
            row.left = fragment.decls[name].max_new_tokens
            old = row.table[start : start + len(new)]
            row.table[start : start + len(new)] = new
            if old:
                self.ledger[DEVICE].drop(old)
                same = common(tuple(old), new)
            if same < len(new):
                first[name] = min(start + same, first.get(name, start + same))
        return first

    def _hold(self, fragment: Fragment, binds: Sequence[Bind]) -> list[tuple[int, ...]]:
        """The engine's blocks for those of some tables, held by each of them."""
        device, plan = self.ledger[DEVICE], [bind.blocks for bind in binds]
        shared = shared_starts(plan)
        rest = [blocks[same:] for blocks, same in zip(plan, shared, strict=True)]
        own = fragment.blocks(DEVICE, [block for blocks in rest for block in blocks])
        device.hold(own)
        at = 0
        tables: list[tuple[int, ...]] = []
        starts: dict[tuple[int, ...], int] = {}
        for blocks, same in zip(rest, shared, strict=True):
            new = own[at : at + len(blocks)]
            at += len(blocks)
            if same:
                start = tables[-1][:same]
                starts[start] = starts.get(start, 0) + 1
                new = start + new
            tables.append(new)
        for start, times in starts.items():
            device.hold(start, times)
        return tables

    def _compute(self, chunk: PrefillChunk) -> bool:
        """Note what a chunk writes; whether it ends its prompt."""
        row, size = self.rows[chunk.request], self.target.block_size
        full = slice(chunk.start // size, chunk.stop // size)
        self.ledger[DEVICE].write(row.table[full], row.job.blocks[full])
        row.computed = max(row.computed, chunk.stop)
        return chunk.stop == row.job.known

    def _begin(self, rows: Sequence[Row], first: dict[str, int]) -> None:
        """Prompts have ended, and give their first tokens: take the blocks of the answers, and decode.

        Where blocks are short, a row decodes as far as it gets, and is planned again.

        Args:
            rows: of the prompts.
            first: see `_bind`; gets those whose tables grow.
        """
        device, size, taken = self.ledger[DEVICE], self.target.block_size, 0
        needs = [max(0, -(-(row.job.known + row.left) // size) - len(row.table)) for row in rows]
        if sum(needs) > device.room:
            self.let_go()
        blocks = device.take(min(sum(needs), device.room))
        for row, need in zip(rows, needs, strict=True):
            name, known, table = row.job.request.id, row.job.known, row.table
            if need:
                first.setdefault(name, len(table))
            table += blocks[taken : taken + need]
            taken += need
            left = min(row.left, len(table) * size - known) - 1
            if left > 0:
                self.batch.enter(name, known + 1, left, tuple(table[: known // size]))
            else:
                self.spent[name] = None

    def _join(self, step: PlanStep, ends: int) -> PlanStep:
        """The batch runs in a step with prefills, where the target mixes them and there is room; else it
        rests."""
        self._sums = step.collectives or self._sums
        batch = self.batch
        tokens = sum(chunk.stop - chunk.start for chunk in step.prefill) + len(batch)
        # The compiler left room for the batch of then; what began since may have none in a full step.
        if not self.target.mixed or not len(batch) or tokens > self.target.max_tokens:
            self.rested += step.cost if len(batch) else 0.0
            # What the fragment would decode may have left the batch.
            return evolve(step, decode=()) if step.decode else step
        size = self.target.block_size
        tables = [
            (chunk.request, tuple(self.rows[chunk.request].table[: chunk.start // size]))
            for chunk in step.prefill
        ]
        step = evolve(
            step,
            decode=batch.names,
            loops=1,
            groups=batch.groups(tables),
            collectives=batch.sums(self._sums, tokens),
            cost=batch.seconds(1, step.prefill, ends),
        )
        self.spent.update(dict.fromkeys(batch.run(1)))
        return step
