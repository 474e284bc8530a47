"""Continuous batching in virtual time: the list scheduler behind the `schedule` pass.

Every step runs the decodes that are under way and fills the rest of its token budget with
prefills ("stall-free batching": A. Agrawal et al., "Sarathi-Serve", arXiv 2403.02310). A request
is admitted when its whole KV span, its answer included, fits beside those that run; so no step
ever needs more device blocks than there are, and `evict` always has a way out.

Everything is driven by events: a step costs what changes in it, not what waits or runs.
"""

import math
from heapq import heappop, heappush

from sagellm_ir.passes.scheduling.admission import Admission
from sagellm_ir.passes.scheduling.jobs import Job
from sagellm_ir.passes.scheduling.problem import MOVE, PREFILL, Problem
from sagellm_ir.passes.scheduling.timeline import Limit, Piece, Timeline
from sagellm_ir.passes.scheduling.worker import WorkerState

__all__ = ["simulate"]

LOOKAHEAD = 4
"""Prefills that may be passed over in a step because they do not fit, at most."""


def simulate(problem: Problem, arrivals: bool, fill: bool) -> Timeline:
    """Assigns every node a step.

    Args:
        problem: the graph.
        arrivals: whether a request can start only after its arrival time.
        fill: whether a prefill may be cut where a step is full.

    Raises:
        SageIRError: a request or a prefill is larger than the target's budgets.
    """
    return Simulation(problem, arrivals, fill).run()


class Simulation(Admission):
    """The part that makes steps."""

    def __init__(self, problem: Problem, arrivals: bool, fill: bool) -> None:
        super().__init__(problem, arrivals, fill)
        self.seated = [-1] * len(problem.rank)
        """By request: the last step in which it had a seat."""

    def run(self) -> Timeline:
        """Makes steps, of the worker that is first in virtual time, until all nodes have run."""
        while True:
            now, index = math.inf, 0
            for number, state in enumerate(self.workers):
                if (time := self._next_time(state)) < now:
                    now, index = time, number
            if now < math.inf:
                state = self.workers[index]
                state.now = now
                if state.inbox:
                    self._receive(state)
                self._step(index, state)
            elif singles := self.jobs.scatter():
                for job in singles:
                    self._route(job, max(state.now for state in self.workers))
            else:
                break
        self._check_complete()
        if len(self.workers) > 1:
            self.timeline.gather()
        return self.timeline

    def _next_time(self, state: WorkerState) -> float:
        if state.running or state.decodes or state.ready or state.moves:
            return state.now
        if state.leaving and state.queue:
            return state.now
        if state.queue and state.stuck is None:
            return state.now
        return max(state.now, state.inbox[0][0]) if state.inbox else math.inf

    def _step(self, index: int, state: WorkerState) -> None:
        """Runs one step; leaves no trace when there was nothing to do."""
        mixed, rows = self.target.mixed, len(state.running)
        state.rows = state.pairs = state.reads = state.logits = 0
        state.transfer = 0.0
        state.open, state.decoding = True, mixed
        self._make_room(state, rows if mixed else 0)
        moves, state.moves = state.moves, []
        decodes, state.decodes = state.decodes, []
        for node in moves:
            self._move(state, node)
        if mixed:
            self._start_all(state, decodes)
        limit = self._limit(state, self._fill(state))
        if not mixed and state.rows:  # decodes rest
            state.decodes[:0] = decodes
        elif not mixed:
            state.decoding = True
            self._make_room(state, rows)
            self._start_all(state, decodes)
        state.open = False
        busy = state.done or state.rows or (state.running and state.decoding)
        if busy or (state.leaving and state.stuck is Limit.KV):
            self._advance(index, state, limit)

    def _make_room(self, state: WorkerState, rows: int) -> None:
        state.room = self.target.max_tokens - rows
        state.seats = self.target.max_batch - rows

    def _limit(self, state: WorkerState, passed: bool) -> tuple[Limit | None, int]:
        """What kept more work out of the step, and whose work that is."""
        if state.ready and (passed or state.room <= 0 or state.seats <= 0):
            why = Limit.BATCH if state.seats <= 0 and not passed else Limit.TOKENS
            return why, self.by_rank[state.ready[0][0]]
        if state.queue:
            return state.stuck or Limit.TOKENS, state.queue[0][2].request
        return None, -1

    def _ready(self, state: WorkerState, node: int) -> None:
        """A node whose operands are there and whose order edges are met."""
        problem = self.problem
        kind = problem.kind[node]
        if kind == PREFILL:
            job = self.jobs.of[node]
            assert job is not None
            heappush(state.ready, (job.rank, node))
        elif node in self.problem.made_by:
            self._run_instant(state, node)
        elif kind == MOVE or not self.size[node]:
            if state.open and self._settled(node):
                self._move(state, node)
            else:
                state.moves.append(node)
        elif not (state.open and self._settled(node) and self._start(state, node)):
            state.decodes.append(node)

    def _settled(self, node: int) -> bool:
        """Whether no operand is made by the forward of this very step."""
        kind, finished = self.problem.kind, self.jobs.finished
        for read in self.problem.operands[node]:
            if not finished[read] and kind[read] != MOVE:
                return False
        return True

    def _place(self, node: int) -> None:
        timeline = self.timeline
        timeline.step[node] = step = len(timeline.loops)
        timeline.issued.append(node)
        timeline.places.append(step)

    def _release(self, state: WorkerState, node: int) -> None:
        """The value is there: users on this worker that waited only for it are ready."""
        missing, job_of, worker = self.missing, self.jobs.of, self.problem.worker
        here = worker[node]
        for user in self.problem.users[node]:
            if worker[user] == here:
                missing[user] -= 1
                if not missing[user] and (job := job_of[user]) is not None and job.admitted:
                    self._ready(state, user)

    def _move(self, state: WorkerState, node: int) -> None:
        """Makes a move; or a decode without forwards on top of one, which takes no row either."""
        self._place(node)
        state.done.append(node)
        if self.problem.kind[node] == MOVE:
            state.transfer += self.problem.transfer(node, self.cost)
        else:
            self.timeline.until[node] = self.timeline.step[node]
        self._release(state, node)

    def _run_instant(self, state: WorkerState, node: int) -> None:
        """A decode without forwards: its token comes out of the prefill it follows."""
        timeline, prefix = self.timeline, self.problem.made_by[node]
        timeline.until[node] = timeline.step[node] = timeline.step[prefix]
        timeline.issued.append(node)
        timeline.places.append(timeline.step[node])
        state.done.append(node)
        self._release(state, node)

    def _start(self, state: WorkerState, node: int) -> bool:
        """Lets a decode run from this step on; False when the step has no row for it."""
        if not state.decoding or state.room <= 0 or state.seats <= 0:
            return False
        state.room -= 1
        state.seats -= 1
        self._place(node)
        heappush(state.running, (state.forwards + self.size[node], node))
        state.context += self.problem.start[node]
        return True

    def _start_all(self, state: WorkerState, nodes: list[int]) -> None:
        """Starts decodes; those for which there is no row wait on, before all others."""
        if nodes:
            state.decodes[:0] = [node for node in nodes if not self._start(state, node)]

    def _fill(self, state: WorkerState) -> bool:
        """Issues prefills and admits jobs while the step has room; True if any did not fit."""
        ready, queue = state.ready, state.queue
        passed: list[tuple[int, int]] = []
        while state.room > 0 and len(passed) < LOOKAHEAD:
            if queue and state.stuck is None and not (ready and ready[0][0] < queue[0][0]):
                self._admit(state)
                continue
            if not ready:
                break
            entry = heappop(ready)
            rows = self._rows(state, entry[1])
            if rows and self._take_seat(state, entry[1]):
                if not self._prefill(state, entry[1], rows):
                    passed.append(entry)
                    break
                continue
            passed.append(entry)
            # passing over is fair only to what fits in the next step, whatever starts until then
            if self.size[entry[1]] > self.sure:
                break
        for entry in passed:
            heappush(ready, entry)
        return bool(passed)

    def _rows(self, state: WorkerState, node: int) -> int:
        """How many rows of a prefill to run now: all that are left, a part, or none."""
        size, start, block = self.size[node], self.start[node], self.target.block_size
        if size <= state.room:
            return size
        if not self.fill or node in self.problem.copied:
            return 0
        aligned = (start + state.room) // block * block - start
        if aligned > 0:
            return aligned
        return state.room if block > self.sure else 0

    def _take_seat(self, state: WorkerState, node: int) -> bool:
        """A sequence has one seat in a step, however many of its prefills run in it."""
        owner, step = self.problem.owner[node], len(self.timeline.loops)
        if self.seated[owner] != step:
            if state.seats <= 0:
                return False
            state.seats -= 1
            self.seated[owner] = step
        return True

    def _prefill(self, state: WorkerState, node: int, rows: int) -> bool:
        """Runs rows of a prefill; False when some are left."""
        start = self.start[node]
        state.room -= rows
        state.rows += rows
        state.pairs += rows * (2 * start + rows + 1) // 2
        state.reads += start
        self._place(node)
        if rows < self.size[node]:
            piece = Piece(start + rows, len(self.timeline.loops))
            self.timeline.pieces.setdefault(node, []).append(piece)
            self.start[node] += rows
            self.size[node] -= rows
            return False
        state.logits += self.problem.ends[node]
        state.done.append(node)
        self._release(state, node)
        return True

    def _advance(self, index: int, state: WorkerState, limit: tuple[Limit | None, int]) -> None:
        """Runs the forwards, records the step, and draws the consequences."""
        timeline, rows = self.timeline, len(state.running) if state.decoding else 0
        loops, cost = self._price(state, rows)
        timeline.loops.append(loops)
        timeline.worker.append(index)
        timeline.start.append(state.now)
        timeline.cost.append(cost)
        timeline.limit.append(limit[0])
        timeline.head.append(limit[1])
        state.now += cost
        if rows:
            state.forwards += loops
            state.context += rows * loops
            while state.running and state.running[0][0] <= state.forwards:
                _, node = heappop(state.running)
                timeline.until[node] = len(timeline.loops) - 1
                state.context -= self.problem.start[node] + self.problem.size[node]
                state.done.append(node)
                self._release(state, node)
        done, state.done = state.done, []
        left, state.leaving = state.leaving, []
        for job in left:
            self._unpin(job)
        ended = dict.fromkeys(job for node in done for job in self._finish(state, node))
        for job in ended:
            if self._waits(job):
                self.workers[job.worker].leaving.append(job)
            else:
                self._unpin(job)
        if state.inbox:
            self._receive(state)

    def _price(self, state: WorkerState, rows: int) -> tuple[int, float]:
        """Forwards of the step and its seconds."""
        if not rows and not state.rows:
            return 0, state.transfer
        context = state.context if rows else 0
        read = min(context, state.pinned * self.target.block_size) + state.reads
        loops = 1
        if not state.rows:
            loops = min(state.running[0][0] - state.forwards, self.target.max_loops)
            if state.inbox:  # a coming request should not wait for a long step
                once = self.cost.forward(rows, context + rows, read, rows)
                loops = min(loops, max(1, math.ceil((state.inbox[0][0] - state.now) / once)))
        # attention grows by a key a row in each forward: price the one in the middle
        pairs = state.pairs + context + rows * (loops + 1) // 2
        tokens, logits = rows + state.rows, rows + state.logits
        return loops, state.transfer + loops * self.cost.forward(tokens, pairs, read, logits)

    def _finish(self, state: WorkerState, node: int) -> list[Job]:
        """The step of a node is over: what waited for it may go on, and its job may end.

        Returns the jobs whose KV nobody admitted needs any more.
        """
        ended = []
        for job in self.jobs.finish(node):
            home = self.workers[job.worker]
            if job.active:
                job.active = False
                home.active -= 1
                home.stuck = None
            if not job.copies:
                ended.append(job)
        if len(self.workers) > 1:
            for user in self.problem.users[node]:
                self.missing[user] -= self.jobs.crosses(node, user)
        if node in self.problem.followers:
            self._follow(node)
        if node in self.jobs.parked:
            for job in self.jobs.parked.pop(node):
                self._route(job, state.now)
        return ended

    def _follow(self, node: int) -> None:
        for follower in self.problem.followers[node]:
            self.missing[follower] -= 1
            job = self.jobs.of[follower]
            if not self.missing[follower] and job is not None and job.admitted:
                self._ready(self.workers[job.worker], follower)
