"""`Requests`: what an online planner knows of the requests it was given, and who may start next."""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from hashlib import blake2b

from attrs import define, field

from sagellm_ir.graph import RequestDecl
from sagellm_ir.identity import BlockIds, Namespace, UnreadPrompt
from sagellm_ir.lowering.plan import PlanRequest
from sagellm_ir.runtime.ledger import Ledger
from sagellm_ir.target import Target

__all__ = ["Job", "Requests", "Row"]

_FEW = 4096
"""Block ids that are never worth forgetting."""


@define(eq=False)
class Job:
    """A submitted request."""

    request: PlanRequest
    number: int
    """How many were submitted before it."""
    prompt: UnreadPrompt | None
    """Until it is read."""
    blocks: tuple[int, ...] = ()
    """Content ids of the full blocks of what is known of it, once it is read."""
    last: bytes = b""
    """Of its prompt's last full block: see `BlockIds.of_rest`."""
    answered: int = 0
    """Tokens of its answer when it was planned last."""
    private: list[int] = field(factory=list)
    """Those of `blocks` that hold generated tokens: nobody else asks for them."""

    @property
    def known(self) -> int:
        """Tokens of its prompt and its answer when it was planned last."""
        return self.request.prompt_len + self.answered


@define(eq=False)
class Row:
    """A request that holds blocks."""

    job: Job
    left: int = 0
    """Tokens of its answer that are planned."""
    table: list[int] = field(factory=list)
    computed: int = 0
    """Tokens whose KV is in the table while its prompt is computed."""


class Requests:
    """Unfinished requests, and those that wait."""

    def __init__(self, target: Target) -> None:
        self.jobs: dict[str, Job] = {}
        self.waiting: dict[str, Job] = {}
        """Those that hold no block and have tokens to come."""
        self._size = target.block_size
        self._space = lru_cache(maxsize=256)(partial(Namespace, target.model.name))
        self._ids = BlockIds(target.block_size)
        self._tidy_at = _FEW
        self._submitted = 0
        self._turns: dict[tuple[str | None, str], dict[str, None]] = {}

    def add(self, request: PlanRequest, tokens: Sequence[int]) -> None:
        """Take up a request with this prompt."""
        space = self._space(request.adapter, request.tenant)
        prompt = self._ids.unread(tokens, space)
        job = Job(request, self._submitted, prompt)
        self._submitted += 1
        self.jobs[request.id] = self.waiting[request.id] = job
        if request.session is not None:
            self._turns.setdefault((request.tenant, request.session), {})[request.id] = None

    def read(self, job: Job) -> tuple[int, ...]:
        """The blocks of a request: its prompt is read when it may start, not while many wait."""
        if job.prompt is not None:
            job.blocks, job.last = self._ids.read(job.prompt)
            job.prompt = None
        return job.blocks

    def end(self, name: str) -> Job:
        """Forget a request."""
        job = self.jobs.pop(name)
        self.waiting.pop(name, None)
        if job.request.session is not None:
            turn = (job.request.tenant, job.request.session)
            del self._turns[turn][name]
            if not self._turns[turn]:
                del self._turns[turn]
        return job

    def eligible(self) -> Iterator[Job]:
        """Who may start, in order; a turn of a session after those before it have ended."""
        order = sorted(self.waiting.values(), key=lambda job: (-job.request.priority, job.number))
        for job in order:
            session = job.request.session
            if session is None or job.request.id == next(
                iter(self._turns[job.request.tenant, session])
            ):
                yield job

    def decl(self, job: Job, most: int | None, priority: int) -> RequestDecl:
        """The request as the passes see it: what it has answered counts as prompt.

        Args:
            job: the request.
            most: tokens of its answer to plan; None: all.
            priority: in place of its own.
        """
        request = job.request
        full = job.known // self._size
        for at in range(len(self.read(job)), full):
            digest = blake2b(f"{job.number}:{at}".encode(), digest_size=16, person=b"generated")
            own = self._ids.of_digest(digest.digest())
            job.blocks += (own,)
            job.private.append(own)
        left = request.max_new_tokens - job.answered
        return RequestDecl(
            request.id,
            max_new_tokens=min(left, most or left),
            priority=priority,
            deadline=request.deadline,
            adapter=request.adapter,
            tenant=request.tenant,
            prompt_len=job.known,
            blocks=job.blocks[:full],
        )

    def answer(self, job: Job, tokens: Sequence[int]) -> tuple[int, ...]:
        """Content ids of the full blocks behind those of a prompt, now that its answer is known.

        Args:
            job: the request.
            tokens: prompt and answer.
        """
        full = job.request.prompt_len // self._size * self._size
        return self._ids.of_rest(job.last, tokens[full:])

    def tidy(self, ledger: Ledger) -> None:
        """Forget ids of blocks that no tier and no request has, each time they have doubled."""
        if len(self._ids) < self._tidy_at:
            return
        kept = {content for shelf in ledger.values() for content in shelf.block_of}
        self._ids.keep(kept.union(*(job.blocks for job in self.jobs.values())))
        self._tidy_at = max(_FEW, 2 * len(self._ids))
