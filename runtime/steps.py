"""`Steps`: the steps of fragments and of the batch, as what an engine is to do."""

from collections.abc import Callable, Sequence

from attrs import evolve

from sagellm_ir.graph import RequestDecl
from sagellm_ir.lowering.plan import Bind, Collective, PlanStep, PrefillChunk
from sagellm_ir.runtime.batch import Batch
from sagellm_ir.runtime.fragment import Fragment, Held
from sagellm_ir.runtime.ledger import Ledger
from sagellm_ir.runtime.requests import Job, Requests, Row
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
        self.full = False
        """Whether those that wait cannot start until something ends or comes."""
        self.rested = 0.0
        """Predicted seconds since the decodes ran last."""
        self._sums: tuple[Collective, ...] = ()
        """The collectives of some step."""

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
            self.full = True
            self.close()
            return None
        fragment.position += 1
        moves = fragment.moves(step.kv)
        fragment.blocks(DEVICE, [block for bind in fresh for block in bind.blocks])
        binds = [self._bind(fragment, bind) for bind in fresh]
        ended = [self.rows[chunk.request] for chunk in step.prefill if self._compute(chunk)]
        joined = self._join(step, len(ended))
        fragment.begun.update(row.job.request.id for row in ended)
        binds += self._begin(ended)
        if fragment.next() is None:
            # What of it has not started waits for something to end.
            self.full = any(name in self.requests.waiting for name in fragment.decls)
            self.close()
        return evolve(joined, kv=tuple(moves), binds=tuple(binds))

    def decode(self) -> PlanStep:
        """The batch runs alone."""
        batch, loops = self.batch, self.batch.loops()
        step = PlanStep(
            0,
            self.target.workers[0].name,
            decode=batch.names,
            loops=loops,
            groups=batch.groups(),
            collectives=batch.sums(self._sums, len(batch)),
            cost=batch.seconds(loops),
        )
        ended = batch.run(loops)
        self.spent.update(dict.fromkeys(ended))
        self.late.update(name for name, idle in ended.items() if not idle)
        self.rested = 0.0
        return step

    def settle(self, answered: Callable[[str], int | None]) -> None:
        """Requests that have their planned tokens: what is not over is planned again. Those whose
        last token is in flight (None) are left as they are."""
        told = {name: count for name in self.spent if (count := answered(name)) is not None}
        for name, count in told.items():
            row = self.rows[name]
            job = row.job
            job.answered = count
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
        for content, block in zip(decl.blocks[:full], row.table, strict=False):
            device.write(block, content)
        return Held(decl.id, row.table[full], row.computed) if inside else None

    def requeue(self, job: Job) -> None:
        """Plan a request anew, from what the cache keeps of it."""
        row = self.rows.pop(job.request.id, None)
        if row is not None:
            self.ledger[DEVICE].drop(row.table)
            self.requests.waiting[job.request.id] = job

    def end(self, job: Job, tokens: Sequence[int] | None) -> None:
        """A request has ended, and holds its blocks no more; full ones of its answer stay cached if
        its tokens are known."""
        name, device, size = job.request.id, self.ledger[DEVICE], self.target.block_size
        row = self.rows.pop(name, None)
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
        if tokens is not None:
            # The newest token has no KV.
            contents = self.requests.answer(job, tokens[:-1])
            table = row.table[job.request.prompt_len // size :]
            for content, block in zip(contents, table, strict=False):
                device.write(block, content)
        device.drop(row.table)

    def _bind(self, fragment: Fragment, bind: Bind) -> Bind:
        """Let a table hold blocks; the request has a row from here on."""
        row = self.rows.get(bind.request)
        if row is None:
            row = self.rows[bind.request] = Row(self.requests.waiting.pop(bind.request))
        row.left = fragment.decls[bind.request].max_new_tokens
        device, blocks = self.ledger[DEVICE], fragment.blocks(DEVICE, bind.blocks)
        stop = bind.at + len(blocks)
        device.hold(blocks)
        if old := row.table[bind.at : stop]:
            device.drop(old)
        row.table[bind.at : stop] = blocks
        return Bind(bind.request, bind.at, blocks)

    def _compute(self, chunk: PrefillChunk) -> bool:
        """Note what a chunk writes; whether it ends its prompt."""
        row, device, size = self.rows[chunk.request], self.ledger[DEVICE], self.target.block_size
        full = slice(chunk.start // size, chunk.stop // size)
        for block, content in zip(row.table[full], row.job.blocks[full], strict=True):
            device.write(block, content)
        row.computed = max(row.computed, chunk.stop)
        return chunk.stop == row.job.known

    def _begin(self, rows: Sequence[Row]) -> list[Bind]:
        """Prompts have ended, and give their first tokens: take the blocks of the answers, and decode.

        Where blocks are short, a row decodes as far as it gets, and is planned again.
        """
        device, size = self.ledger[DEVICE], self.target.block_size
        needs = [max(0, -(-(row.job.known + row.left) // size) - len(row.table)) for row in rows]
        blocks, taken, binds = device.take(min(sum(needs), device.room)), 0, []
        for row, need in zip(rows, needs, strict=True):
            name, known, old = row.job.request.id, row.job.known, len(row.table)
            own = blocks[taken : taken + need]
            taken += need
            row.table += own
            left = min(row.left, len(row.table) * size - known) - 1
            if left > 0:
                self.batch.enter(name, known + 1, left, tuple(row.table[: known // size]))
            else:
                self.spent[name] = None
            if own:
                binds.append(Bind(name, old, own))
        return binds

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
