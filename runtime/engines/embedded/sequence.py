"""One request inside the engine: its tokens, how it draws and streams, and when it ends."""

from collections.abc import Collection

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import PlanRequest
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.backend import Finish, Likelihood, RequestView, TokenEvent
from sagellm_ir.runtime.engines.embedded.sampling import Sampler
from sagellm_ir.runtime.engines.embedded.tokenizer import Detokenizer, ModelTokenizer

__all__ = ["Sequence"]


class Sequence:
    """State of one request.

    Raises:
        SageIRError: stop strings without a tokenizer, or sampling parameters out of range.
    """

    def __init__(
        self,
        request: PlanRequest,
        sampling: Sampling,
        tokenizer: ModelTokenizer | None,
        eos: Collection[int],
    ) -> None:
        if sampling.stop and (tokenizer is None or not all(sampling.stop)):
            reason = "the model has no tokenizer" if tokenizer is None else "one of them is empty"
            raise SageIRError(Diagnostic(f"request {request.id!r} has stop strings, but {reason}"))
        self.request = request
        self.tokens = list(request.tokens or ())
        self.computed = 0
        self.finish: Finish | None = None
        self.sampler = Sampler(sampling)
        self._eos = eos
        self._detokenizer = Detokenizer(tokenizer, sampling.stop) if tokenizer else None

    @property
    def generated(self) -> int:
        """Tokens answered so far."""
        return len(self.tokens) - self.request.prompt_len

    def push(self, token: int, likelihood: Likelihood | None = None) -> TokenEvent:
        """Take the next token of the answer; says whether it is the last one."""
        self.tokens.append(token)
        index = self.generated - 1
        text, stopped = "", token in self._eos
        if self._detokenizer and not stopped:
            text, stopped = self._detokenizer.push(token)
        if stopped:
            self.finish = "stop"
        elif self.generated >= self.request.max_new_tokens:
            self.finish = "length"
        if self.finish and self._detokenizer:
            # After a stop string nothing is held back any more: flush gives only what may show.
            text += self._detokenizer.flush()
        return TokenEvent(self.request.id, token, text, index, self.finish, likelihood)

    def abort(self) -> TokenEvent:
        """End it here."""
        self.finish = "abort"
        text = self._detokenizer.flush() if self._detokenizer else ""
        return TokenEvent(self.request.id, None, text, self.generated, "abort")

    def view(self) -> RequestView:
        """For the planner."""
        return RequestView(
            self.request.id,
            self.request.prompt_len,
            self.computed,
            self.generated,
            self.request.max_new_tokens,
            self.finish,
        )
