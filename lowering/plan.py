"""`ExecutionPlan`: what an engine executes. Plain data: versioned, serialisable, engine-neutral."""

from attrs import field, frozen

from sagellm_ir.request import RequestInfo, Sampling
from sagellm_ir.target import Target

__all__ = [
    "PLAN_VERSION",
    "Bind",
    "Collective",
    "ExecutionPlan",
    "KVFree",
    "KVMove",
    "LiveBlock",
    "PlanRequest",
    "PlanStep",
    "PrefillChunk",
    "PrefixGroup",
    "Resident",
]

PLAN_VERSION = 1


@frozen
class PlanRequest(RequestInfo):
    """A request of the plan: what an engine must know to answer it."""

    prompt_len: int = field(kw_only=True)
    tokens: tuple[int, ...] | None = field(default=None, kw_only=True)
    """The prompt's token ids; None when the workload (a trace) never had any."""
    sampling: Sampling = field(default=Sampling(), kw_only=True)
    blocks: tuple[int, ...] = field(default=(), kw_only=True)
    """One id per full block of the prompt, equal exactly where KV is equal. `Resident.ids` and
    `verify_plan` speak of content with them; an engine that has no cache needs none."""


@frozen
class KVMove:
    """Copy blocks, `src[i]` to `dst[i]`, between tiers or between workers' devices."""

    from_tier: str
    to_tier: str
    src: tuple[int, ...]
    dst: tuple[int, ...]
    from_worker: str | None = None
    """None: the worker of the step."""
    node: str = ""
    """The IR node this came from."""


@frozen
class KVFree:
    """Give blocks of a tier back. What they hold may be overwritten from here on."""

    tier: str
    blocks: tuple[int, ...]
    worker: str | None = None
    """None: the worker of the step."""


@frozen
class Resident:
    """KV that a tier holds: physical block `blocks[i]` holds the content with id `ids[i]`."""

    tier: str
    ids: tuple[int, ...]
    blocks: tuple[int, ...]
    """As many as `ids`, least recently used first."""
    worker: str | None = None
    """None: the first worker of the target."""


@frozen
class LiveBlock:
    """The unfinished last block of a request that ran before the plan, on the device.

    With the resident blocks before it, it holds the KV of the request's first `tokens` tokens.
    """

    request: str
    block: int
    tokens: int
    worker: str | None = None
    """None: the first worker of the target."""


@frozen
class Bind:
    """Set a request's block table from block index `at` on: `table[at : at + len(blocks)] = blocks`.

    Blocks that another request wrote are shared, not copied. A bind may repeat entries already
    there (a table whose blocks came back from a lower tier elsewhere).
    """

    request: str
    at: int
    blocks: tuple[int, ...]


@frozen
class PrefillChunk:
    """Run prompt tokens `[start, stop)` of a request; its blocks hold `[0, start)` already.

    The chunk that reaches the last token known of the request yields the next one: the first new
    token at the prompt's end. (An online plan may count answered tokens as prompt; a chunk that
    recomputes a dropped prefix ends short of what is known, and yields nothing.)
    """

    request: str
    start: int
    stop: int


@frozen
class PrefixGroup:
    """Rows of this step whose tables agree on blocks for tokens `[start, stop)`.

    Groups form a forest: a group nests in the one that ends where it starts and holds its rows.
    """

    start: int
    stop: int
    requests: tuple[str, ...]


@frozen
class Collective:
    """A tensor-parallel collective of every forward of the step."""

    group: str
    bytes: int
    """Payload of one call."""
    calls: int
    """Calls of one forward."""
    fused: str | None = None


@frozen
class PlanStep:
    """One decision of the engine. Order inside: `kv` (as listed), `binds`, then the forward(s).

    A step with prefill chunks runs one forward over all its rows; a decode-only step runs `loops`
    forwards, one token a row each; a step without rows runs none. In a forward, each layer writes
    the KV of all rows before attention reads, so a chunk may build on another one of its step.
    """

    index: int
    worker: str = "w0"
    kv: tuple[KVMove | KVFree, ...] = ()
    binds: tuple[Bind, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[str, ...] = ()
    """Ids of the requests that each advance by `loops` tokens."""
    loops: int = 1
    groups: tuple[PrefixGroup, ...] = ()
    collectives: tuple[Collective, ...] = ()
    cost: float = 0.0
    """Predicted seconds."""


@frozen
class ExecutionPlan:
    """A target and the steps to run on it, in order."""

    name: str
    target: Target
    requests: tuple[PlanRequest, ...]
    steps: tuple[PlanStep, ...]
    resident: tuple[Resident, ...] = ()
    """What each tier must hold before the plan starts (the engine's cache it was compiled for)."""
    live: tuple[LiveBlock, ...] = ()
    """Requests that go on inside a block; their full blocks are resident."""
    retained: tuple[Resident, ...] = ()
    """What each tier still holds, as cache, after the last step. Everything else is free then."""
    version: int = PLAN_VERSION
