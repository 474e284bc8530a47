"""`Memory`: tiers and block tables on symbols, for `Replay`.

A block's symbol is what its KV stands for: a content id of a full prompt block, or (request, block
index) for blocks that belong to one request. KV is append-only, so a block knows how far it is
filled, and a read is legal exactly when the table's symbols and fill reach that far.
"""

from attrs import define, field

from sagellm_ir.diagnostics import Diagnostic, suggest
from sagellm_ir.lowering.plan import (
    Bind,
    ExecutionPlan,
    KVFree,
    KVMove,
    LiveBlock,
    PlanRequest,
    Resident,
)
from sagellm_ir.target import DEVICE

__all__ = ["Block", "Memory", "State"]

MOST_ERRORS = 20
_UNBOUND = -1


@define(eq=False)
class Block:
    """One physical block that holds something."""

    content: object
    filled: int = 0
    """Tokens written, from the block's start."""
    holders: set[str] = field(factory=set)
    """Unfinished requests whose tables hold it."""


@define(eq=False)
class State:
    """One request."""

    request: PlanRequest
    worker: str = ""
    table: list[int] = field(factory=list)
    readable: int = 0
    """Tokens known to be in the table's blocks; may lag behind."""
    generated: int = 0
    started: bool = False
    """Whether it has had a row."""
    tail: Block | None = None
    """The block it decodes into."""
    room: int = 0
    """Tokens, fewer than the last, that it can decode into its tail if nobody else holds that."""

    @property
    def finished(self) -> bool:
        return self.generated >= self.request.max_new_tokens

    @property
    def written(self) -> int:
        """Tokens whose KV is there once the prompt is done: the newest token has none yet."""
        return self.request.prompt_len + self.generated - 1

    def content(self, at: int) -> object:
        """What block `at` of the table stands for."""
        blocks = self.request.blocks
        return blocks[at] if at < len(blocks) else (self.request.id, at)


class Memory:
    """What every tier of every worker holds, and every request's table.

    What is wrong with a change is noted in `errors`, and the change is made as far as it makes sense.
    """

    def __init__(self, plan: ExecutionPlan) -> None:
        self.plan, self.target = plan, plan.target
        self.size = plan.target.block_size
        self.errors: list[Diagnostic] = []
        self.where = "plan"
        self.states = {request.id: State(request) for request in plan.requests}
        self.capacity = {
            (tier.name, worker.name): tier.blocks
            for tier in plan.target.tiers
            for worker in plan.target.workers
        }
        self.blocks: dict[tuple[str, str], dict[int, Block]] = {pool: {} for pool in self.capacity}
        self.changed: dict[str, set[str]] = {worker.name: set() for worker in plan.target.workers}
        """For each worker, requests whose tables have changed since its groups were checked."""

    def error(self, message: str, help: str = "") -> None:
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(Diagnostic(f"{self.where}: {message}", help=help))

    def hold(self, resident: Resident) -> None:
        held = self.pool(resident.tier, resident.worker or self.target.workers[0].name)
        if held is None:
            return
        if len(resident.ids) != len(resident.blocks):
            self.error(f"resident of {resident.tier!r}: ids and blocks differ in number")
        for content, block in zip(resident.ids, resident.blocks, strict=False):
            if self.inside(resident.tier, resident.worker, block) and block in held:
                self.error(f"block {block} of tier {resident.tier!r} is resident twice")
            held[block] = Block(content, self.size)

    def resume(self, live: LiveBlock) -> None:
        worker = live.worker or self.target.workers[0].name
        held, state = self.pool(DEVICE, worker), self.states.get(live.request)
        index, filled = divmod(live.tokens, self.size)
        if held is None or not self.inside(DEVICE, worker, live.block):
            return
        if state is None or not filled or live.block in held:
            self.error(f"block {live.block} cannot be the live one of {live.request!r}")
            return
        held[live.block] = Block(state.content(index), filled)

    def pool(self, tier: str, worker: str) -> dict[int, Block] | None:
        """The held blocks of a tier, or None after saying that there is no such tier."""
        if (tier, worker) in self.blocks:
            return self.blocks[tier, worker]
        if self.target.tier(tier) is None:
            known = [other.name for other in self.target.tiers]
            self.error(f"the target has no tier {tier!r}", suggest(tier, known))
        else:
            known = [other.name for other in self.target.workers]
            self.error(f"the target has no worker {worker!r}", suggest(worker, known))
        return None

    def inside(self, tier: str, worker: str | None, block: int) -> bool:
        """Whether a block is within its tier; says so if not."""
        capacity = self.capacity[tier, worker or self.target.workers[0].name]
        if not 0 <= block < capacity:
            self.error(f"block {block} is outside tier {tier!r} of {capacity} blocks")
            return False
        return True

    def free(self, action: KVFree, worker: str) -> None:
        held = self.pool(action.tier, action.worker or worker)
        for block in action.blocks if held is not None else ():
            assert held is not None
            if (found := held.pop(block, None)) is None:
                self.error(f"frees block {block} of tier {action.tier!r}, which is free")
                continue
            for name in found.holders:
                state = self.states[name]
                at = state.table.index(block)
                state.table[at] = _UNBOUND
                state.readable, state.room = min(state.readable, at * self.size), 0
                self.changed[state.worker].add(name)

    def move(self, action: KVMove, worker: str) -> None:
        origin = action.from_worker or worker
        source, held = self.pool(action.from_tier, origin), self.pool(action.to_tier, worker)
        if source is None or held is None:
            return
        if source is held:
            self.error(f"moves blocks within tier {action.to_tier!r}")
        if len(action.src) != len(action.dst) or not action.src:
            self.error(f"moves {len(action.src)} blocks to {len(action.dst)}")
        for block, target in zip(action.src, action.dst, strict=False):
            found = source.get(block)
            if found is None:
                self.error(f"moves block {block} of tier {action.from_tier!r}, which is free")
            elif not self.inside(action.to_tier, worker, target):
                pass
            elif target in held:
                self.error(f"moves onto block {target} of tier {action.to_tier!r}, which is held")
            else:
                held[target] = Block(found.content, found.filled)

    def bind(self, action: Bind, worker: str) -> None:
        if (state := self.live(action.request)) is None:
            return
        if state.worker != worker:
            self.drop(state)
            state.worker = worker
        if not 0 <= action.at <= len(state.table) or not action.blocks:
            self.error(f"binds {action.request!r} from block {action.at} of {len(state.table)} on")
            return
        held = self.blocks[DEVICE, worker]
        state.readable, state.room = min(state.readable, action.at * self.size), 0
        self.changed[worker].add(action.request)
        for at, block in enumerate(action.blocks, action.at):
            if not self.inside(DEVICE, worker, block):
                block = _UNBOUND
            elif block not in held:
                held[block] = Block(state.content(at))
            elif held[block].content != state.content(at):
                self.error(
                    f"binds block {block} as block {at} of {action.request!r}, but it holds "
                    f"{held[block].content}"
                )
                block = _UNBOUND
            if at < len(state.table):
                self.unhold(state, state.table[at])
                state.table[at] = block
            else:
                state.table.append(block)
            if block != _UNBOUND:
                held[block].holders.add(action.request)

    def unhold(self, state: State, block: int) -> None:
        if block != _UNBOUND:
            self.blocks[DEVICE, state.worker][block].holders.discard(state.request.id)

    def drop(self, state: State) -> None:
        """Forget a table."""
        for block in state.table:
            self.unhold(state, block)
        state.table.clear()
        state.readable = state.room = 0
        state.tail = None

    def live(self, name: str) -> State | None:
        """A request that can still have rows; says so if it cannot."""
        if (state := self.states.get(name)) is None:
            self.error(f"the plan has no request {name!r}", suggest(name, self.states))
        elif state.finished:
            self.error(f"{name!r} has got all its tokens already")
        else:
            return state
        return None

    def covers(self, state: State, stop: int) -> bool:
        """Whether the table has blocks for `[0, stop)`; says so if not."""
        need = -(-stop // self.size)
        if len(state.table) < need or _UNBOUND in state.table[state.readable // self.size : need]:
            self.error(f"the table of {state.request.id!r} does not cover {stop} tokens")
            return False
        return True

    def reads(self, state: State, stop: int) -> bool:
        """Whether the table's blocks hold KV for `[0, stop)`; says so if not."""
        held = self.blocks[DEVICE, state.worker]
        while state.readable < stop:
            number = state.table[state.readable // self.size]
            ahead = held[number].filled - state.readable % self.size
            if ahead <= 0:
                self.error(
                    f"{state.request.id!r} reads token {state.readable} of its KV, which is not "
                    f"written (block {number})"
                )
                return False
            state.readable += ahead
        return True

    def write(self, state: State, start: int, stop: int) -> None:
        """Append KV for `[start, stop)` to the table's blocks."""
        held = self.blocks[DEVICE, state.worker]
        at = start
        while at < stop:
            index, offset = divmod(at, self.size)
            end = min(stop, (index + 1) * self.size)
            block = held[state.table[index]]
            others = [
                name
                for name in block.holders
                if name != state.request.id and self.states[name].readable > index * self.size
            ]
            if others:
                self.error(
                    f"{state.request.id!r} writes block {state.table[index]} while "
                    f"{others[0]!r} shares it"
                )
            elif block.filled != offset:
                self.error(
                    f"{state.request.id!r} writes token {at} into block {state.table[index]}, "
                    f"which is filled up to {block.filled} of {self.size}"
                )
            block.filled = end - index * self.size
            at = end

    def settle(self, state: State) -> None:
        """Note how far a request can decode without further checks."""
        index, offset = divmod(state.written, self.size)
        number = state.table[index] if index < len(state.table) else _UNBOUND
        if number != _UNBOUND and state.readable == state.written:
            state.tail = self.blocks[DEVICE, state.worker][number]
            left = state.request.max_new_tokens - state.generated
            state.room = min(self.size - offset, left - 1)
