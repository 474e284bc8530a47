"""`Epochs`: when an online planner compiles, and what: a fragment for what has come.

A request that is compiled again (its prefill was interrupted, or its answer outgrew what was
planned) enters as one whose prompt is all it has so far. Its full blocks are cached content that
`kv-reuse` hits; private ids stand for blocks of generated tokens. The block it is in the middle of is
a `LiveBlock`. So nothing is computed twice.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, takewhile

from attrs import evolve

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import ExecutionPlan, PlanRequest
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.runtime.fragment import Fragment, assemble
from sagellm_ir.runtime.requests import Job
from sagellm_ir.runtime.steps import Steps
from sagellm_ir.target import DEVICE

__all__ = ["Epochs"]

logger = logging.getLogger(__name__)


class Epochs:
    """Compiles what has come and not finished its prompt, against what the engine holds.

    Args:
        steps: what the engine holds and runs; gets the fragments.
        passes: the compiler.
        reserve: tokens of an answer to plan at a time; None: all.
        window: waiting requests to plan at a time.
    """

    def __init__(self, steps: Steps, passes: PassManager, reserve: int | None, window: int) -> None:
        self._steps, self._passes = steps, passes
        self._reserve, self._window = reserve, window
        self.count = 0
        """Compilations so far."""
        self.newest: Callable[[], ExecutionPlan] | None = None
        """Makes the plan of the newest fragment."""
        self.hidden: set[str] = set()
        """Requests that the engine has not reported yet."""
        self._fresh = False
        """Whether something has come since the last compilation."""

    def come(self, request: PlanRequest) -> None:
        """A request has come, and is among those known."""
        steps = self._steps
        self.hidden.add(request.id)
        self._fresh, steps.full = True, False
        if steps.fragment is not None and self._is_urgent(request, steps.fragment):
            steps.close()

    def _is_urgent(self, request: PlanRequest, fragment: Fragment) -> bool:
        """Whether a request should not wait until those before it have started."""
        waiting = self._steps.requests.waiting
        return request.deadline is not None or any(
            request.priority > waiting[name].request.priority
            for name in fragment.decls
            if name in waiting
        )

    def may_start(self) -> bool:
        """Whether to compile now, rather than let the batch decode on.

        A prefill now, and another one for what comes during the next decode step, keep the rows of
        the batch waiting for one decision more, which costs about two forwards; a prefill after that
        step keeps those that could start now waiting for the step. The larger sum of seconds decides.
        """
        steps = self._steps
        if steps.under_way:
            return True
        waiting = min(len(steps.requests.waiting) - len(self.hidden), self._seats())
        if waiting <= 0 or steps.full:
            return False
        return not steps.rested or waiting * steps.target.max_loops >= 2 * len(steps.batch)

    def is_early(self) -> bool:
        """Whether the fragment was compiled before something came that could run in its next step.

        A prefill more, for what came too late, costs the batch more than compiling again; when it has
        begun, only if its next step is half empty.
        """
        fragment = self._steps.fragment
        if fragment is None or not self._fresh or self.hidden:
            return False
        if fragment.position and not self.has_space():
            return False
        return len(fragment.decls) < min(self._seats(), self._window)

    def has_space(self) -> bool:
        """Whether more than half of the next step's tokens are free, as far as it is known."""
        fragment = self._steps.fragment
        step = None if fragment is None else fragment.next()
        chunks = () if step is None else step.prefill
        tokens = sum(chunk.stop - chunk.start for chunk in chunks)
        return 2 * tokens <= self._steps.target.max_tokens

    def _seats(self) -> int:
        target = self._steps.target
        taken = len(self._steps.batch) + len(self._steps.late)
        return min(target.max_batch, target.max_tokens) - taken

    def begin(self) -> None:
        """Compile what has come and what has not finished its prompt.

        Requests that do not fit together (the lower tiers may be full of what cannot be dropped)
        are planned by halves. Those left out lose what they hold but for what the cache keeps, and
        the rest is computed again.
        """
        steps = self._steps
        steps.let_go()
        steps.requests.tidy(steps.ledger)
        self._fresh = False
        jobs = steps.under_way
        first = len(jobs)
        jobs += islice(self._candidates(), max(min(self._window, self._seats()) - first, 0))
        self.count += 1
        while jobs:
            try:
                steps.fragment = self._compile(jobs)
                self.newest = steps.fragment.plan
                return
            except SageIRError as error:
                if len(jobs) < 2 and not len(steps.batch) and not steps.spent:
                    raise
                logger.debug("epoch %d: %d requests: %s", self.count, len(jobs), error)
            for job in jobs[len(jobs) // 2 :]:
                steps.requeue(job)
            jobs = jobs[: len(jobs) // 2]
        steps.full = True

    def _candidates(self) -> Iterator[Job]:
        """Those that may start, up to the first that there is no room for."""
        device, size = self._steps.ledger[DEVICE], self._steps.target.block_size
        for job in self._steps.requests.eligible():
            if job.request.id in self.hidden:
                continue
            left = job.request.max_new_tokens - job.answered
            need = -(-(job.known + min(left, self._reserve or left)) // size)
            if need > device.room:
                blocks = self._steps.requests.read(job)
                need -= sum(1 for _ in takewhile(device.block_of.__contains__, blocks))
                if need > device.room:
                    return
            yield job

    def _compile(self, jobs: Sequence[Job]) -> Fragment:
        steps = self._steps
        above = max((job.request.priority for job in jobs), default=0) + 1
        below = min((job.request.priority for job in jobs), default=0)
        decls, held = [], []
        for job in jobs:
            row = steps.rows.get(job.request.id)
            ahead = above - below if row else 0  # What is under way goes first.
            decl = steps.requests.decl(job, self._reserve, job.request.priority + ahead)
            decls.append(decl)
            if row is not None and (block := steps.hold(row, decl)):
                held.append(block)
        target, taken = steps.target, len(steps.batch)
        # How far they decode is decided anew, so that is not worth a step for every few tokens.
        longest = max((decl.max_new_tokens for decl in decls), default=1)
        target = evolve(
            target,
            max_loops=max(target.max_loops, longest),
            max_batch=target.max_batch - taken,
            max_tokens=target.max_tokens - (taken if target.mixed else 0),
        )
        return assemble(f"epoch{self.count}", target, decls, held, steps.ledger, self._passes.run)
