"""A request in the simulator."""

from attrs import define

from sagellm_ir.lowering.plan import PlanRequest
from sagellm_ir.runtime.backend import Finish, RequestView

__all__ = ["Sequence"]


@define(eq=False)
class Sequence:
    """How far a request is; times are virtual seconds."""

    request: PlanRequest
    length: int
    """Tokens of its answer."""
    generated: int = 0
    computed: int = 0
    own: int = 0
    """Prompt tokens its prefills computed before its first token."""
    finish: Finish | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def known(self) -> int:
        """Tokens of its prompt and of its answer so far."""
        return self.request.prompt_len + self.generated

    def view(self) -> RequestView:
        """See `EngineView`."""
        request = self.request
        return RequestView(
            request.id,
            request.prompt_len,
            self.computed,
            self.generated,
            request.max_new_tokens,
            self.finish,
        )
