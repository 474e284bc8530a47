"""Jobs: which nodes are admitted together, what they must wait for, what KV they hold."""

from attrs import define, field

from sagellm_ir.passes.scheduling.problem import MOVE, Problem

__all__ = ["Job", "Jobs"]


@define(eq=False)
class Job:
    """The part of a request's work that one worker does in one go: the unit of admission.

    Its nodes are the request's own and those they build on that no job has claimed before.
    """

    request: int
    worker: int
    rank: int
    """Its request's place in the order of admission."""
    nodes: list[int] = field(factory=list)
    """In order; empty while the request waits unopened."""
    left: int = 0
    """Nodes that have not run."""
    copies: int = 0
    """Copies to other workers that have not been made: until then its KV stays."""
    admitted: bool = False
    active: bool = False
    """Whether it is admitted, and has nodes left."""


class Jobs:
    """The jobs of one simulation. Nodes, requests and workers are indexes."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.of: list[Job | None] = [None] * len(problem.kind)
        """The job that claimed a node."""
        self.finished = bytearray(len(problem.kind))
        self.parked: dict[int, list[Job]] = {}
        """Jobs by the node they wait for."""
        self._pins = [0] * len(problem.kind)
        self._many = len(problem.graph.target.workers) > 1
        self._moves = MOVE in problem.kind

    def crosses(self, node: int, user: int) -> bool:
        """Whether an edge leads to another worker."""
        return self.problem.worker[node] != self.problem.worker[user]

    def open(self, waiting: Job) -> list[Job]:
        """Claims for a request that waited unopened: one job for each stay on a worker."""
        claimed = self._claim(waiting.request)
        if not self._many:
            waiting.nodes = claimed
            waiting.left = len(claimed)
            for node in claimed:
                self.of[node] = waiting
            return [waiting] if claimed else []
        worker = self.problem.worker
        level: dict[int, int] = {}
        jobs: dict[tuple[int, int], Job] = {}
        for node in claimed:
            depth = 0
            for read in self.problem.operands[node]:
                if read in level:
                    depth = max(depth, level[read] + self.crosses(read, node))
            level[node] = depth
            job = jobs.get((depth, worker[node]))
            if job is None:
                job = Job(waiting.request, worker[node], waiting.rank)
                jobs[depth, worker[node]] = job
            self._join(job, node)
        return list(jobs.values())

    def _claim(self, request: int) -> list[int]:
        """The request's nodes and all they build on that no job has, in order.

        With a node come its copies to other workers: it has to stay until they are made, so
        they must not wait for a request that can be admitted only after this one has left. A
        decode without forwards comes with its prefill, as it runs in the same step.
        """
        problem, taken, operands = self.problem, self.of, self.problem.operands
        stack = [node for node in problem.owned[request] if taken[node] is None]
        seen = set(stack)
        for node in stack:  # grows while it is read
            near = operands[node]
            if self._many:
                near = near + [user for user in problem.users[node] if self.crosses(node, user)]
            if node in problem.instant:
                near = [*near, problem.instant[node]]
            for other in near:
                if taken[other] is None and other not in seen:
                    seen.add(other)
                    stack.append(other)
        stack.sort()
        return stack

    def _join(self, job: Job, node: int) -> None:
        self.of[node] = job
        job.nodes.append(node)
        job.left += 1
        if self._many:
            job.copies += sum(self.crosses(node, user) for user in self.problem.users[node])

    def blocker(self, job: Job) -> int | None:
        """A node of another job that must finish first.

        KV that an admitted job on the same worker is about to make is none: the job can follow
        as soon as the value is there.
        """
        operands, waits, finished, job_of = (
            self.problem.operands,
            self.problem.waits,
            self.finished,
            self.of,
        )
        for node in job.nodes:
            for wait in waits[node]:
                if not finished[wait] and job_of[wait] is not job:
                    return wait
            for read in operands[node]:
                if finished[read] or (maker := job_of[read]) is job:
                    continue
                if maker is None or not maker.admitted or self.crosses(read, node):
                    return read
        return None

    def park(self, job: Job) -> bool:
        """Parks the job at its blocker; False when it has none and may be queued."""
        blocker = self.blocker(job)
        if blocker is not None:
            self.parked.setdefault(blocker, []).append(job)
        return blocker is not None

    def finish(self, node: int) -> tuple[Job, ...]:
        """Marks a node as finished; returns the jobs with nothing left, of these: its own, and
        those whose KV it copied from another worker."""
        self.finished[node] = 1
        own = self.of[node]
        assert own is not None, "a node runs only after a job has claimed it"
        own.left -= 1
        if not self._many:
            return () if own.left else (own,)
        touched = [own]
        for read in self.problem.operands[node]:
            if self.crosses(read, node):
                other = self.of[read]
                assert other is not None, "it has run"
                other.copies -= 1
                touched.append(other)
        return tuple(job for job in dict.fromkeys(touched) if not job.left)

    def scatter(self) -> list[Job]:
        """Breaks up parked jobs that wait for each other into single nodes.

        Single nodes cannot: the graph is acyclic. A decode without forwards stays with its
        prefill. Empty when no job can be broken up.
        """
        parked = [job for jobs in self.parked.values() for job in jobs]
        made_by, singles = self.problem.made_by, dict[int, Job]()
        for job in parked:
            for node in job.nodes:
                first = made_by.get(node, node)
                if first not in singles:
                    singles[first] = Job(job.request, job.worker, job.rank)
        if len(singles) == len(parked):
            return []
        self.parked = {}
        for job in parked:
            for node in job.nodes:
                self._join(singles[made_by.get(node, node)], node)
        return list(singles.values())

    def pin(self, job: Job) -> int:
        """Counts a job in on all KV it needs on its device; returns the blocks that adds.

        A needed value counts once in its prefix, so a chain is walked only as far as it was
        not needed before.
        """
        pins, blocks, prefix = self._pins, self.problem.blocks, self.problem.prefix
        added = 0
        for node in self._held(job):
            at = node
            while at >= 0:
                pins[at] += 1
                if pins[at] > 1:
                    break
                added += blocks[at]
                at = prefix[at]
        return added

    def unpin(self, job: Job) -> int:
        """Takes `pin` back; returns the blocks that are not needed any more."""
        pins, blocks, prefix = self._pins, self.problem.blocks, self.problem.prefix
        freed = 0
        for node in self._held(job):
            at = node
            while at >= 0:
                pins[at] -= 1
                if pins[at]:
                    break
                freed += blocks[at]
                at = prefix[at]
        return freed

    def _held(self, job: Job) -> list[int]:
        """The job's nodes, and what its moves copy from on its own worker."""
        problem = self.problem
        if not self._moves:
            return job.nodes
        sources = [
            read
            for node in job.nodes
            if problem.kind[node] == MOVE
            for read in problem.operands[node]
            if not self.crosses(read, node)
        ]
        return job.nodes + sources if sources else job.nodes
