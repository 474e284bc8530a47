"""What `LMDeployBackend` keeps of its requests, and the plan sources through which it gives steps."""

import threading

from attrs import define

from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.backend import EngineView
from sagellm_ir.runtime.engines.embedded.tokenizer import Detokenizer

__all__ = ["Client", "Nothing", "OneStep"]


@define
class Client:
    """A submitted request, and how far its answer was read."""

    request: PlanRequest
    sampling: Sampling
    session: int
    read: int = 0
    ended: bool = False
    """Its answer was read to the end."""
    told: bool = False
    """The end was handed out."""
    arrived: bool = False
    """It was seen in LMDeploy's scheduler."""
    words: Detokenizer | None = None

    def text(self, token: int | None, last: bool) -> str:
        """What became certain with a token, and with the end."""
        if self.words is None:
            return ""
        text = "" if token is None else self.words.push(token)[0]
        return text + self.words.flush() if last else text


class Nothing:
    """A source with no steps."""

    def next_step(self, view: EngineView) -> PlanStep | None:
        """See `PlanSource`."""
        return None


class OneStep:
    """Gives one step; being asked again means that it has run."""

    def __init__(self, step: PlanStep) -> None:
        self._step: PlanStep | None = step
        self.ran = threading.Event()

    @property
    def given(self) -> bool:
        """Whether the engine took it."""
        return self._step is None

    def next_step(self, view: EngineView) -> PlanStep | None:
        """See `PlanSource`."""
        step, self._step = self._step, None
        if step is None:
            self.ran.set()
        return step
