"""An engine that holds several steps in flight: it computes at once, and tells late."""

from collections import Counter, deque

from attrs import define, evolve, field

from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.backend import EngineView, Finish, RequestView, TokenEvent
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine
from sagellm_ir.target import Target
from tests.server.tiny import tiny_model

__all__ = ["LateEngine"]


@define
class _Told:
    """What the outside knows of a request."""

    request: PlanRequest
    tokens: int = 0
    finish: Finish | None = None


@define
class _Step:
    """A step in flight."""

    events: list[TokenEvent]
    rows: Counter[str] = field(factory=Counter)
    """Tokens that requests wait for, as far as the outside knows."""


class LateEngine(EmbeddedEngine):
    """What is in flight has run before anything that follows, so its blocks may be used again."""

    def __init__(self, target: Target, depth: int) -> None:
        super().__init__(tiny_model(), target)
        self.depth = depth
        self.overlaps = 0
        """Steps that began while one was in flight."""
        self._told: dict[str, _Told] = {}
        self._steps: deque[_Step] = deque()

    def submit(self, request: PlanRequest, sampling: Sampling = Sampling()) -> None:
        super().submit(request, sampling)
        self._told[request.id] = _Told(request)

    def begin(self, step: PlanStep) -> None:
        assert len(self._steps) < self.depth
        names = {*step.decode, *(chunk.request for chunk in step.prefill)}
        assert not names - self._told.keys(), "a request that was released"
        seen = {name: self._seen(name) for name in names}
        rows = Counter(name for name in step.decode if not seen[name].finish)
        for name in rows:
            assert seen[name].generated < seen[name].max_new_tokens, "more tokens than it wants"
        for chunk in step.prefill:
            known = seen[chunk.request].prompt_len + seen[chunk.request].generated
            assert chunk.stop <= known or seen[chunk.request].finish
            rows[chunk.request] += chunk.stop == known
        self.overlaps += bool(self._steps)
        self._steps.append(_Step(super().step(step), rows))

    def take(self) -> list[TokenEvent]:
        made = []
        for event in self._steps.popleft().events:
            told = self._told.get(event.request)
            if event.token is not None and told is not None and not told.finish:
                told.tokens += 1
                told.finish = event.finish
                made.append(event)
        return made

    def step(self, step: PlanStep) -> list[TokenEvent]:
        self.begin(step)
        return self.take()

    def abort(self, request: str) -> None:
        super().abort(request)
        self._told[request].finish = self._told[request].finish or "abort"

    def release(self, request: str) -> None:
        super().release(request)
        if told := self._told.pop(request, None):
            assert told.finish, "it has not ended"

    def view(self) -> EngineView:
        views = [self._seen(name) for name in self._told]
        return evolve(
            super().view(),
            waiting=tuple(v for v in views if not v.finish and not v.computed),
            running=tuple(v for v in views if not v.finish and v.computed),
            finished=tuple(v for v in views if v.finish),
        )

    def _seen(self, name: str) -> RequestView:
        told = self._told[name]
        pending = sum(step.rows[name] for step in self._steps)
        return RequestView(
            name,
            told.request.prompt_len,
            self._sequences[name].computed,
            told.tokens + pending,
            told.request.max_new_tokens,
            told.finish,
            pending,
        )
