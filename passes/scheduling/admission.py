"""Who may start: queues of jobs, and the KV that admitted ones hold or will grow to."""

from abc import ABC, abstractmethod
from heapq import heappop, heappush

from sagellm_ir.cost import CostModel
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.passes.scheduling.jobs import Job, Jobs
from sagellm_ir.passes.scheduling.problem import PREFILL, Problem
from sagellm_ir.passes.scheduling.timeline import Limit, Timeline
from sagellm_ir.passes.scheduling.worker import WorkerState
from sagellm_ir.target import DEVICE

__all__ = ["Admission"]


class Admission(ABC):
    """The part of a simulation that lets jobs in. Nodes, requests and workers are indexes.

    Args:
        problem: the graph.
        arrivals: whether a request can start only after its arrival time.
        fill: whether a prefill may be cut where a step is full.
    """

    def __init__(self, problem: Problem, arrivals: bool, fill: bool) -> None:
        target = problem.graph.target
        self.problem = problem
        self.target = target
        self.cost = CostModel(target)
        tier = target.tier(DEVICE)
        self.capacity = tier.blocks if tier else 0
        self.max_rows = min(target.max_batch, target.max_tokens)
        self.sure = target.max_tokens - (self.max_rows if target.mixed else 0)
        """Rows that any step has for prefills."""
        self.missing = [
            len(reads) + len(waits)
            for reads, waits in zip(problem.operands, problem.waits, strict=True)
        ]
        count, requests = len(problem.kind), len(problem.rank)
        self.fill = fill
        self.jobs = Jobs(problem)
        self.start = problem.start.copy()
        """Tokens of each prefill that are done, and those before it."""
        self.size = problem.size.copy()
        """Rows of each prefill that are left; forwards of each decode."""
        self.timeline = Timeline(count, requests)
        self.workers = [WorkerState() for _ in target.workers]
        self.posted = 0
        self.by_rank = sorted(range(requests), key=problem.rank.__getitem__)
        self._check_sizes()
        self._open_doors(arrivals)

    def _open_doors(self, arrivals: bool) -> None:
        """Requests wait at the worker of their first node, as jobs without nodes."""
        problem, timeline = self.problem, self.timeline
        for i in self.by_rank:  # in order: so the queues are heaps
            if not problem.owned[i]:
                continue
            job = Job(i, problem.worker[problem.owned[i][0]], problem.rank[i])
            if arrivals:
                self._post(job, problem.graph.requests[i].arrival)
            else:
                self.workers[job.worker].queue.append((job.rank, 0, job))
                timeline.ready[i] = timeline.queued[i] = 0

    def _check_sizes(self) -> None:
        most = self.target.max_tokens
        for i, kind in enumerate(self.problem.kind):
            whole = not self.fill or i in self.problem.copied
            if kind == PREFILL and whole and self.size[i] > most:
                node = self.problem.graph.nodes[i]
                raise SageIRError(
                    Diagnostic(
                        f"%{node.name} prefills {self.size[i]} tokens, but a step of target "
                        f"{self.target.name!r} has room for {most}",
                        loc=node.loc,
                        help="run chunk-prefill before schedule",
                    )
                )

    @abstractmethod
    def _ready(self, state: WorkerState, node: int) -> None:
        """A node of an admitted job has its operands, and its order edges are met."""

    def _post(self, job: Job, time: float) -> None:
        self.posted += 1
        heappush(self.workers[job.worker].inbox, (time, job.rank, self.posted, job))

    def _route(self, job: Job, time: float) -> None:
        if not self.jobs.park(job):
            self._post(job, time)

    def _receive(self, state: WorkerState) -> None:
        """Moves what has come by now from the inbox to the queue."""
        head = state.queue[0] if state.queue else None
        ready = self.timeline.ready
        while state.inbox and state.inbox[0][0] <= state.now:
            _, rank, number, job = heappop(state.inbox)
            heappush(state.queue, (rank, number, job))
            if ready[job.request] < 0:
                ready[job.request] = len(self.timeline.loops)
            self.timeline.queued[job.request] = len(self.timeline.loops)
        if state.queue and state.queue[0] is not head:
            state.stuck = None

    def _admit(self, state: WorkerState) -> None:
        """Takes the head of the queue in, or says in `state.stuck` why not."""
        _, _, job = state.queue[0]
        if not job.nodes:
            self.timeline.opened[job.request] = len(self.timeline.loops)
            parts = self.jobs.open(job)
            if parts != [job] or self.jobs.park(job):
                heappop(state.queue)
                for part in parts:
                    if part is not job:
                        self._route(part, state.now)
                self._receive(state)
                return
        if state.active >= self.max_rows:
            state.stuck = Limit.BATCH
            return
        needed = self.jobs.pin(job)
        if state.pinned + needed > self.capacity:
            self.jobs.unpin(job)
            state.stuck = Limit.KV
            if not state.pinned:
                raise self._too_big(job, needed)
            return
        heappop(state.queue)
        state.pinned += needed
        state.active += 1
        job.admitted = job.active = True
        if self.timeline.admitted[job.request] < 0:
            self.timeline.admitted[job.request] = len(self.timeline.loops)
        missing = self.missing
        for node in [node for node in job.nodes if not missing[node]]:
            self._ready(state, node)

    def _unpin(self, job: Job) -> None:
        home = self.workers[job.worker]
        home.pinned -= self.jobs.unpin(job)
        home.stuck = None

    def _waits(self, job: Job) -> bool:
        """Whether the last step made a value of the job that others need later: it can be copied
        in the next step at the earliest, so it keeps its place till then."""
        timeline, finished, last = self.timeline, self.jobs.finished, len(self.timeline.loops) - 1
        return any(
            max(timeline.step[node], timeline.until[node]) == last
            and not all(finished[user] for user in self.problem.users[node])
            for node in job.nodes
        )

    def _too_big(self, job: Job, needed: int) -> SageIRError:
        request = self.problem.graph.requests[job.request]
        return SageIRError(
            Diagnostic(
                f"request @{request.id} needs {needed} KV blocks at once, but the device tier of "
                f"target {self.target.name!r} has {self.capacity}",
                loc=request.loc,
                help="raise the tier's blocks, or lower max_new or the length of the prompt",
            )
        )

    def _check_complete(self) -> None:
        """Workers that wait for each other's memory stop before all nodes have run."""
        for state in self.workers:
            if state.queue:
                request = self.problem.graph.requests[state.queue[0][2].request]
                raise SageIRError(
                    Diagnostic(
                        f"the KV of request @{request.id} finds no room: workers wait for each "
                        f"other's device tiers to empty",
                        loc=request.loc,
                        help="raise the device tier's blocks, or place sharing requests together",
                    )
                )
        assert all(self.jobs.of[node] for owned in self.problem.owned for node in owned)
