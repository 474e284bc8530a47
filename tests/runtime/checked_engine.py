"""A simulator that also keeps what each KV slot stands for, and checks every read."""

from sagellm_ir.lowering.plan import KVFree, PlanRequest, PlanStep
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.backend import TokenEvent
from sagellm_ir.runtime.engines.simulator import SimulatorEngine
from sagellm_ir.target import DEVICE

__all__ = ["CheckedEngine"]

Slots = dict[int, int]
"""Of one block: for each written slot, the hash of the tokens up to it."""


class CheckedEngine(SimulatorEngine):
    """Fails when a row reads KV that is not exactly that of its own tokens so far, or a step is too large."""

    def submit(self, request: PlanRequest, sampling: Sampling = Sampling()) -> None:
        super().submit(request, sampling)
        if not hasattr(self, "blocks"):
            self.blocks: dict[tuple[str, str, int], Slots] = {}
            self.tables: dict[str, list[int]] = {}
            self.tokens: dict[str, list[int]] = {}
            self.recomputed = 0
        assert request.tokens is not None
        self.tokens[request.id] = list(request.tokens)
        self.tables[request.id] = []

    def step(self, step: PlanStep) -> list[TokenEvent]:
        chunks = sum(chunk.stop - chunk.start for chunk in step.prefill)
        assert chunks + len(step.decode) <= self.target.max_tokens
        assert len(step.prefill) + len(step.decode) <= self.target.max_batch
        for action in step.kv:
            if isinstance(action, KVFree):
                for block in action.blocks:
                    assert (
                        self.blocks.pop((action.worker or step.worker, action.tier, block), None)
                        is not None
                    )
                continue
            origin = action.from_worker or step.worker
            for src, dst in zip(action.src, action.dst, strict=True):
                target = (step.worker, action.to_tier, dst)
                assert target not in self.blocks
                self.blocks[target] = dict(self.blocks[origin, action.from_tier, src])
        for bind in step.binds:
            table = self.tables[bind.request]
            assert bind.at <= len(table)
            table[bind.at : bind.at + len(bind.blocks)] = bind.blocks
            for block in bind.blocks:
                self.blocks.setdefault((step.worker, DEVICE, block), {})
        for chunk in step.prefill:
            self.write(step.worker, chunk.request, chunk.start, chunk.stop)
        for chunk in step.prefill:
            self.read(step.worker, chunk.request, chunk.start)
        before = {name: len(self.tokens[name]) for name in step.decode}
        ended = {name for name in step.decode if self._sequence(name).finish}
        events = super().step(step)
        for event in events:
            if event.token is not None:
                self.tokens[event.request].append(event.token)
        for name in step.decode:
            if name not in ended:
                start, stop = before[name] - 1, len(self.tokens[name]) - 1
                self.read(step.worker, name, start)
                self.write(step.worker, name, start, stop)
        return events

    def slot(self, worker: str, request: str, position: int) -> tuple[Slots, int]:
        block = self.tables[request][position // self.target.block_size]
        return self.blocks[worker, DEVICE, block], position % self.target.block_size

    def write(self, worker: str, request: str, start: int, stop: int) -> None:
        for position in range(start, stop):
            slots, at = self.slot(worker, request, position)
            value = hash(tuple(self.tokens[request][: position + 1]))
            assert slots.get(at, value) == value, "KV of other tokens is overwritten"
            slots[at] = value

    def read(self, worker: str, request: str, stop: int) -> None:
        for position in range(stop):
            slots, at = self.slot(worker, request, position)
            assert slots.get(at) == hash(tuple(self.tokens[request][: position + 1])), (
                f"{request} reads token {position}: wrong KV"
            )
