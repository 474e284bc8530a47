"""`Replay`: runs a plan on symbols and notes everything that is wrong with it.

A block's symbol is what its KV stands for: a content id of a full prompt block, or (request, block
index) for blocks that belong to one request. KV is append-only, so a block knows how far it is
filled, and a read is legal exactly when the table's symbols and fill reach that far.
"""

import math
from collections.abc import Iterable, Sequence

from attrs import define, field

from sagellm_ir.diagnostics import Diagnostic, suggest
from sagellm_ir.lowering.plan import (
    PLAN_VERSION,
    Bind,
    ExecutionPlan,
    KVFree,
    KVMove,
    LiveBlock,
    PlanRequest,
    PlanStep,
    PrefillChunk,
    PrefixGroup,
    Resident,
)
from sagellm_ir.target import DEVICE

__all__ = ["Block", "Replay"]

_MOST_ERRORS = 20
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
class _State:
    """One request."""

    request: PlanRequest
    worker: str = ""
    table: list[int] = field(factory=list)
    readable: int = 0
    """Tokens known to be in the table's blocks; may lag behind."""
    generated: int = 0
    started: bool = False
    """Whether it has had a row."""

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


class Replay:
    """The state of all tiers and requests while a plan is replayed.

    `run` replays all of it; or `header`, then `step` for each step that an engine has run.
    """

    def __init__(self, plan: ExecutionPlan) -> None:
        self.plan, self.target = plan, plan.target
        self.size = plan.target.block_size
        self.errors: list[Diagnostic] = []
        self.where = "plan"
        self.states = {request.id: _State(request) for request in plan.requests}
        self.capacity = {
            (tier.name, worker.name): tier.blocks
            for tier in plan.target.tiers
            for worker in plan.target.workers
        }
        self.blocks: dict[tuple[str, str], dict[int, Block]] = {pool: {} for pool in self.capacity}
        self.checked: dict[str, tuple[PrefixGroup, ...]] = {}

    def error(self, message: str, help: str = "") -> None:
        if len(self.errors) < _MOST_ERRORS:
            self.errors.append(Diagnostic(f"{self.where}: {message}", help=help))

    def run(self) -> None:
        self.header()
        if self.errors:
            return
        for position, step in enumerate(self.plan.steps):
            self.where = f"step {position}"
            self.step(position, step)
            if len(self.errors) >= _MOST_ERRORS:
                return
        self.where = "end of plan"
        self.end()

    def header(self) -> None:
        """Version, requests and residents."""
        plan = self.plan
        if plan.version != PLAN_VERSION:
            self.error(f"its version is {plan.version}, and this release runs {PLAN_VERSION}")
        if len(self.states) != len(plan.requests):
            self.error("two requests have one id")
        meaning: dict[int, tuple[int, ...]] = {}
        for request in plan.requests:
            if request.prompt_len < 1:
                self.error(f"the prompt of {request.id!r} is empty")
            if request.tokens is not None and len(request.tokens) != request.prompt_len:
                count = len(request.tokens)
                self.error(f"{request.id!r} has {count} tokens, not {request.prompt_len}")
            elif len(request.blocks) > request.prompt_len // self.size:
                self.error(f"{request.id!r} has more block ids than full blocks")
            elif request.tokens is not None:
                for at, content in enumerate(request.blocks):
                    tokens = request.tokens[at * self.size : (at + 1) * self.size]
                    if meaning.setdefault(content, tokens) != tokens:
                        self.error(f"block id {content} of {request.id!r} stands for other tokens")
        for resident in plan.resident:
            self.hold(resident)
        for live in plan.live:
            self.resume(live)

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

    def step(self, position: int, step: PlanStep) -> None:
        if step.index != position:
            self.error(f"its index is {step.index}")
        if self.pool(DEVICE, step.worker) is None:
            return
        for action in step.kv:
            if isinstance(action, KVFree):
                self.free(action, step.worker)
            else:
                self.move(action, step.worker)
        for bind in step.binds:
            self.bind(bind, step.worker)
        self.budgets(step)
        chunks = [chunk for chunk in step.prefill if self.can_prefill(chunk, step.worker)]
        decode = [name for name in dict.fromkeys(step.decode) if self.can_decode(name, step)]
        for chunk in chunks:
            self.states[chunk.request].started = True
            self.write(self.states[chunk.request], chunk.start, chunk.stop)
        # Attention reads after all chunks are written, so they may build on each other.
        reads = {chunk.request: chunk.start for chunk in chunks}
        reads |= {name: self.states[name].written for name in decode}
        rows = {name: stop for name, stop in reads.items() if self.reads(self.states[name], stop)}
        self.groups(step, rows)
        for chunk in chunks:
            state = self.states[chunk.request]
            if chunk.stop == state.request.prompt_len and not state.generated:
                self.advance(state, 1)
        for name in decode:
            state = self.states[name]
            self.write(state, state.written, state.written + step.loops)
            self.advance(state, step.loops)

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
                state.readable = min(state.readable, at * self.size)

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
        state.readable = min(state.readable, action.at * self.size)
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

    def unhold(self, state: _State, block: int) -> None:
        if block != _UNBOUND:
            self.blocks[DEVICE, state.worker][block].holders.discard(state.request.id)

    def drop(self, state: _State) -> None:
        """Forget a table."""
        for block in state.table:
            self.unhold(state, block)
        state.table.clear()
        state.readable = 0

    def live(self, name: str) -> _State | None:
        """A request that can still have rows; says so if it cannot."""
        if (state := self.states.get(name)) is None:
            self.error(f"the plan has no request {name!r}", suggest(name, self.states))
        elif state.finished:
            self.error(f"{name!r} has got all its tokens already")
        else:
            return state
        return None

    def budgets(self, step: PlanStep) -> None:
        target = self.target
        rows = len(step.prefill) + len(step.decode)
        tokens = len(step.decode) + sum(chunk.stop - chunk.start for chunk in step.prefill)
        least, most = min(rows, 1), target.max_loops if step.decode else 1
        if step.prefill:
            most = 1
        if not least <= step.loops <= most:
            self.error(f"{step.loops} forwards, and {least} to {most} are legal")
        names = [*(chunk.request for chunk in step.prefill), *step.decode]
        if len(set(names)) != len(names):
            self.error("two rows of one request")
        if rows > target.max_batch:
            self.error(f"{rows} rows, and the target's batch is {target.max_batch}")
        if tokens > target.max_tokens:
            self.error(f"{tokens} tokens, and the target's budget is {target.max_tokens}")
        if step.prefill and step.decode and not target.mixed:
            self.error("prefill and decode in one step, which the target does not mix")
        if not (math.isfinite(step.cost) and step.cost >= 0):
            self.error(f"a cost of {step.cost}")
        for reduce in step.collectives:
            if not rows or reduce.bytes < 0 or reduce.calls < 1:
                self.error(f"a collective of {reduce.bytes} bytes, {reduce.calls} times")

    def can_prefill(self, chunk: PrefillChunk, worker: str) -> bool:
        """Whether a chunk is inside its prompt and its table; says so if not."""
        state = self.live(chunk.request)
        if state is None or not self.here(state, worker):
            return False
        length = state.request.prompt_len
        if not 0 <= chunk.start < chunk.stop <= length:
            self.error(f"prefills [{chunk.start}:{chunk.stop}) of a prompt of {length}")
            return False
        return self.covers(state, chunk.stop)

    def can_decode(self, name: str, step: PlanStep) -> bool:
        """Whether a request can decode by the step's tokens; says so if not."""
        state = self.live(name)
        if state is None or not self.here(state, step.worker):
            return False
        left = state.request.max_new_tokens - state.generated
        if not state.generated:
            self.error(f"decodes {name!r}, whose prompt has not ended")
        elif step.loops > left:
            self.error(f"decodes {name!r} by {step.loops} tokens, and {left} are left")
        else:
            return self.covers(state, state.written + step.loops)
        return False

    def here(self, state: _State, worker: str) -> bool:
        if state.worker != worker:
            self.error(f"{state.request.id!r} has no table on worker {worker!r}")
        return state.worker == worker

    def covers(self, state: _State, stop: int) -> bool:
        """Whether the table has blocks for `[0, stop)`; says so if not."""
        need = -(-stop // self.size)
        if len(state.table) < need or _UNBOUND in state.table[state.readable // self.size : need]:
            self.error(f"the table of {state.request.id!r} does not cover {stop} tokens")
            return False
        return True

    def reads(self, state: _State, stop: int) -> bool:
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

    def write(self, state: _State, start: int, stop: int) -> None:
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

    def advance(self, state: _State, count: int) -> None:
        state.generated += count
        if state.finished:
            self.drop(state)

    def groups(self, step: PlanStep, ready: dict[str, int]) -> None:
        """Groups are truthful: each member's KV for the range is the same blocks."""
        if step.groups == self.checked.get(step.worker, ()) and not (step.kv or step.binds):
            members = {name for group in step.groups for name in group.requests}
            if members <= ready.keys() or self.errors:
                return
        self.checked[step.worker] = step.groups
        for group in step.groups:
            self.group(group, step.groups, ready)

    def group(
        self, group: PrefixGroup, groups: Sequence[PrefixGroup], ready: dict[str, int]
    ) -> None:
        span = f"group [{group.start}:{group.stop})"
        members = set(group.requests)
        if not 0 <= group.start < group.stop or not len(group.requests) == len(members) > 1:
            self.error(f"{span} of {len(members)} rows")
            return
        for name in group.requests:
            if name not in ready:
                self.error(f"{span} holds {name!r}, which is no row of the step")
                return
            if ready[name] < group.stop:
                self.error(f"{span} reaches into what {name!r} writes, from {ready[name]} on")
                return
        first, stop = group.start // self.size, -(-group.stop // self.size)
        tables = [self.states[name].table[first:stop] for name in group.requests]
        if any(table != tables[0] for table in tables):
            self.error(f"the tables of {span} differ")
        if group.start and not any(
            other.stop == group.start and members <= set(other.requests) for other in groups
        ):
            self.error(f"{span} nests in no group")
        if any(
            other is not group and other.start == group.start and members & set(other.requests)
            for other in groups
        ):
            self.error(f"{span} overlaps another group")

    def end(self) -> None:
        for name, state in self.states.items():
            if not state.finished:
                got, wanted = state.generated, state.request.max_new_tokens
                self.error(f"{name!r} has got {got} of {wanted} tokens")
        if self.errors:
            return
        for resident in self.plan.retained:
            held = self.pool(resident.tier, resident.worker or self.target.workers[0].name)
            if held is None or len(resident.ids) != len(resident.blocks):
                self.error(f"retained of {resident.tier!r}: ids and blocks differ in number")
                return
            self.retained(resident, held)
        for (tier, worker), held in self.blocks.items():
            if held:
                blocks = _some(held)
                self.error(f"blocks {blocks} of tier {tier!r} on worker {worker!r} are never freed")

    def retained(self, resident: Resident, held: dict[int, Block]) -> None:
        for content, block in zip(resident.ids, resident.blocks, strict=True):
            found = held.pop(block, None)
            if found is None or found.content != content or found.filled != self.size:
                self.error(f"block {block} does not hold content {content}, and is said to")


def _some(blocks: Iterable[int]) -> str:
    """The first blocks of many."""
    first = sorted(blocks)
    return ", ".join(map(str, first[:5])) + (", ..." if len(first) > 5 else "")
