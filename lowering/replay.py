"""`Replay`: runs a plan on symbols and notes everything that is wrong with it."""

import math
from collections.abc import Iterable

from sagellm_ir.lowering.group_check import GroupCheck
from sagellm_ir.lowering.memory import MOST_ERRORS, Block, Memory, State
from sagellm_ir.lowering.plan import (
    PLAN_VERSION,
    ExecutionPlan,
    KVFree,
    PlanStep,
    PrefillChunk,
    Resident,
)
from sagellm_ir.target import DEVICE

__all__ = ["Replay"]


class Replay(Memory):
    """The state of all tiers and requests while a plan is replayed.

    `run` replays all of it; or `header`, then `step` for each step that an engine has run.
    """

    def __init__(self, plan: ExecutionPlan) -> None:
        super().__init__(plan)
        self._groups = {
            worker.name: GroupCheck(self, worker.name) for worker in plan.target.workers
        }

    def run(self) -> None:
        self.header()
        if self.errors:
            return
        for position, step in enumerate(self.plan.steps):
            self.where = f"step {position}"
            self.step(position, step)
            if len(self.errors) >= MOST_ERRORS:
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
        steady, others = self.decodes(step)
        for chunk in chunks:
            self.states[chunk.request].started = True
            self.write(self.states[chunk.request], chunk.start, chunk.stop)
        # Attention reads after all chunks are written, so they may build on each other.
        rows: dict[str, int | None] = dict.fromkeys(state.request.id for state in steady)
        for chunk in chunks:
            if self.reads(self.states[chunk.request], chunk.start):
                rows[chunk.request] = chunk.start
        for state in others:
            if self.reads(state, state.written):
                rows[state.request.id] = None
        self._groups[step.worker].check(step.groups, rows)
        for chunk in chunks:
            state = self.states[chunk.request]
            if chunk.stop == state.request.prompt_len and not state.generated:
                self.advance(state, 1)
        self.generate(steady, others, step.loops)

    def decodes(self, step: PlanStep) -> tuple[list[State], list[State]]:
        """The decode rows: those whose tokens just fill up a block of their own, and others."""
        steady, others = [], []
        for name in dict.fromkeys(step.decode):
            state = self.states.get(name)
            if (
                state is not None
                and 0 < step.loops <= state.room
                and state.worker == step.worker
                and state.tail is not None
                and len(state.tail.holders) == 1
            ):
                steady.append(state)
            elif self.can_decode(name, step):
                others.append(self.states[name])
        return steady, others

    def generate(self, steady: Iterable[State], others: Iterable[State], count: int) -> None:
        """Decode `count` tokens of each row."""
        for state in steady:
            assert state.tail is not None
            state.tail.filled += count
            state.readable += count
            state.generated += count
            state.room -= count
        for state in others:
            start = state.written
            self.write(state, start, start + count)
            self.advance(state, count)
            if not state.finished and self.reads(state, start + count):
                self.settle(state)

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

    def here(self, state: State, worker: str) -> bool:
        if state.worker != worker:
            self.error(f"{state.request.id!r} has no table on worker {worker!r}")
        return state.worker == worker

    def advance(self, state: State, count: int) -> None:
        state.generated += count
        if state.finished:
            self.drop(state)

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
