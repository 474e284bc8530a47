"""`WorkerState`: what the simulation knows of a worker."""

from attrs import define, field

from sagellm_ir.passes.scheduling.jobs import Job
from sagellm_ir.passes.scheduling.timeline import Limit

__all__ = ["WorkerState"]


@define(eq=False)
class WorkerState:
    """One worker at one moment of virtual time."""

    now: float = 0.0
    forwards: int = 0
    """Forwards that its decodes have run: each row advances by one in each."""
    running: list[tuple[int, int]] = field(factory=list)
    """Heap of decode rows: the value of `forwards` at which a row ends, its node."""
    context: int = 0
    """KV tokens that the decode rows attend to, summed."""
    ready: list[tuple[int, int]] = field(factory=list)
    """Heap of prefills whose operands are there."""
    moves: list[int] = field(factory=list)
    """Moves to make in the next step."""
    decodes: list[int] = field(factory=list)
    """Decodes to start in the next step that runs decodes."""
    queue: list[tuple[int, int, Job]] = field(factory=list)
    """Heap of jobs that wait for admission; the number makes entries comparable."""
    inbox: list[tuple[float, int, int, Job]] = field(factory=list)
    """Heap of jobs that join the queue at a later time."""
    pinned: int = 0
    """Device blocks that admitted jobs hold or will grow to."""
    active: int = 0
    """Admitted jobs that have not ended."""
    leaving: list[Job] = field(factory=list)
    """Jobs that have ended, but keep their KV for one more step."""
    stuck: Limit | None = None
    """Why the head of the queue was refused: stands until a job ends or another is the head."""
    # of the step being made:
    open: bool = False
    """Whether moves and decodes may still be added."""
    decoding: bool = False
    """Whether decode rows run in it."""
    room: int = 0
    """Rows still free."""
    seats: int = 0
    """Sequences still free."""
    done: list[int] = field(factory=list)
    """Nodes that finish with the step."""
    rows: int = 0
    """Prefill rows."""
    pairs: int = 0
    """Query-key pairs of the prefills."""
    reads: int = 0
    """KV tokens that the prefills read."""
    logits: int = 0
    """Prefills that end a prompt."""
    transfer: float = 0.0
    """Seconds of the moves."""
