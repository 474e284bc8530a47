"""`run_plan`: a plan on an engine, watched: answers, times and what sharing saved."""

import time
from collections.abc import Callable, Mapping

from attrs import define, field, frozen

from sagellm_ir.lowering.plan import ExecutionPlan, KVMove, PlanRequest, PlanStep
from sagellm_ir.runtime.backend import Finish, InferenceBackend, TokenEvent
from sagellm_ir.runtime.planner import PlanCursor

__all__ = ["Answer", "RunReport", "run_plan"]


@define
class Answer:
    """What one request got. Times are seconds since the run began."""

    request: str
    tokens: list[int] = field(factory=list)
    text: str = ""
    finish: Finish | None = None
    first_token: float | None = None
    done: float | None = None


@frozen
class RunReport:
    """A whole run."""

    answers: Mapping[str, Answer]
    seconds: float
    prompt_tokens: int
    """Of all requests together."""
    computed_tokens: int
    """Prompt tokens that ran through the model; those of a rematerialised prefix count again."""
    moved_blocks: int
    steps: int

    @property
    def generated(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer.tokens) for answer in self.answers.values())

    @property
    def saved_tokens(self) -> int:
        """Prompt tokens that were not computed, because another request or the cache had them."""
        return self.prompt_tokens - self.computed_tokens

    @property
    def hit_ratio(self) -> float:
        """Share of the prompt tokens that were not computed."""
        return self.saved_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def summary(self) -> dict[str, float]:
        """The figures a user asks for first; times in seconds, rates per second."""
        firsts = sorted(a.first_token for a in self.answers.values() if a.first_token is not None)
        seconds = self.seconds or float("inf")
        return {
            "requests": len(self.answers),
            "prompt_tokens": self.prompt_tokens,
            "computed_tokens": self.computed_tokens,
            "saved_tokens": self.saved_tokens,
            "hit_ratio": round(self.hit_ratio, 4),
            "generated_tokens": self.generated,
            "moved_blocks": self.moved_blocks,
            "steps": self.steps,
            "seconds": round(self.seconds, 4),
            "ttft_mean": round(sum(firsts) / len(firsts), 4) if firsts else 0.0,
            "ttft_max": round(firsts[-1], 4) if firsts else 0.0,
            "tokens_per_second": round(self.generated / seconds, 2),
            "prompt_tokens_per_second": round(self.prompt_tokens / seconds, 2),
        }


def run_plan(
    engine: InferenceBackend,
    plan: ExecutionPlan,
    on_token: Callable[[TokenEvent], None] | None = None,
) -> RunReport:
    """Submit a plan's requests, run its steps, release the requests.

    Args:
        engine: made for the plan's target.
        plan: what to run.
        on_token: called with each token as it is made.

    Raises:
        SageIRError: the plan does not fit the engine.
    """
    answers = {request.id: Answer(request.id) for request in plan.requests}
    for request in plan.requests:
        engine.submit(request, request.sampling)
    began = time.perf_counter()
    for event in engine.stream(PlanCursor(plan)):
        _record(answers[event.request], event, time.perf_counter() - began)
        if on_token:
            on_token(event)
    seconds = time.perf_counter() - began
    for request in plan.requests:
        engine.release(request.id)
    return RunReport(
        answers,
        seconds,
        sum(request.prompt_len for request in plan.requests),
        _computed(plan.requests, plan.steps),
        sum(len(item.src) for s in plan.steps for item in s.kv if isinstance(item, KVMove)),
        len(plan.steps),
    )


def _record(answer: Answer, event: TokenEvent, now: float) -> None:
    if event.token is not None:
        answer.tokens.append(event.token)
        if answer.first_token is None:
            answer.first_token = now
    answer.text += event.text
    if event.finish:
        answer.finish, answer.done = event.finish, now


def _computed(requests: tuple[PlanRequest, ...], steps: tuple[PlanStep, ...]) -> int:
    """Prompt tokens that the plan's chunks run through the model."""
    prompt = {request.id: request.prompt_len for request in requests}
    return sum(
        min(chunk.stop, prompt[chunk.request]) - chunk.start
        for step in steps
        for chunk in step.prefill
    )
