"""`StepChecks`: what LMDeploy can run of a plan's step, and what is wrong with it."""

from collections.abc import Container

from attrs import evolve
from lmdeploy.pytorch.messages import MessageStatus

from sagellm_ir.lowering.plan import KVMove, PlanStep
from sagellm_ir.runtime.engines.lmdeploy.view import ENDED, NamedSequences

__all__ = ["StepChecks", "named", "only"]


class StepChecks:
    """Checks of steps against the state of a scheduler.

    Args:
        requests: its sequences; whoever asks has refreshed them.
    """

    def __init__(self, requests: NamedSequences) -> None:
        self._scheduler, self._requests = requests.scheduler, requests
        self.seen: set[str] = set()
        """Requests that were in the scheduler."""

    def parts(self, step: PlanStep) -> list[PlanStep]:
        """A step as LMDeploy can run it, which never mixes: its prefills, then its decodes.

        A chunk of a request that decodes already (an online plan counts its answer as prompt) is a
        decode of one token, or nothing when it would recompute what LMDeploy never dropped. Requests
        that ended early are left out.
        """
        if not step.prefill and not any(map(self.is_over, step.decode)):
            return [step]
        chunks, decode = [], []
        for chunk in step.prefill:
            seq = self._requests.found.get(chunk.request)
            if self.is_over(chunk.request):
                continue
            if seq is None or seq.status != MessageStatus.RUNNING:
                chunks.append(chunk)
            elif chunk.stop >= seq.num_all_ids:
                decode.append(chunk.request)
        decode += [name for name in step.decode if not self.is_over(name)]
        if chunks and decode:
            first = evolve(step, prefill=tuple(chunks), decode=(), groups=())
            return [first, evolve(step, prefill=(), kv=(), decode=tuple(decode), loops=1)]
        loops = 1 if step.prefill else step.loops
        if len(chunks) == len(step.prefill) and not step.decode and loops == step.loops:
            return [step]
        return [evolve(step, prefill=tuple(chunks), decode=tuple(decode), loops=loops)]

    def must_wait(self, step: PlanStep, partial: Container[int] = ()) -> bool:
        """Whether a request of the step is in flight or has not arrived, or the step's moves are not
        safe beside what is in flight, or its prefills have no seats beside that.

        Args:
            step: of prefills or of decodes.
            partial: sequences that may be in flight.
        """
        if in_flight := self._scheduler.num_locked():
            if any(isinstance(item, KVMove) for item in step.kv):
                return True
            taken = len(step.prefill) + in_flight + self._scheduler.num_running()
            if step.prefill and taken > self._scheduler.scheduler_config.max_batches:
                return True
        for name in named(step):
            seq = self._requests.found.get(name)
            if seq is not None:
                if seq.status is MessageStatus.LOCKED and seq.seq_id not in partial:
                    return True
            elif self._requests.names.session(name) is not None and not self.is_over(name):
                return True
        return False

    def problem(self, step: PlanStep, prealloc_size: int, partial: Container[int] = ()) -> str:
        """What is wrong with a step, or nothing; `partial` as above."""
        names = named(step)
        found = self._requests.found
        rows = {name: found[name] for name in names if name in found}
        if len(rows) < len(names):
            unknown = [name for name in names if name not in found]
            return f"unknown requests {unknown}" if unknown else "a request stands in it twice"
        wanted = MessageStatus.WAITING if step.prefill else MessageStatus.RUNNING
        for name, seq in rows.items():
            goes_on = step.prefill and seq.status is MessageStatus.LOCKED and seq.seq_id in partial
            if seq.status is not wanted and not goes_on:
                return f"{name} is {seq.status.name}, not {wanted.name}"
        scheduler = self._scheduler
        taken = scheduler.num_running() + scheduler.num_locked() if step.prefill else 0
        if len(names) + taken > scheduler.scheduler_config.max_batches:
            return f"{len(names)} rows are more than the engine runs at once"
        if not step.prefill:
            most = max(1, prealloc_size)
            return "" if 1 <= step.loops <= most else f"{step.loops} forwards; 1 to {most} can run"
        tokens = sum(chunk.stop - chunk.start for chunk in step.prefill)
        budget = scheduler.cache_config.max_prefill_token_num
        if tokens > budget and len(names) > 1:
            return f"{tokens} prompt tokens; the engine takes {budget}"
        for chunk in step.prefill:
            known = len(rows[chunk.request].history_cache)
            if not 0 <= chunk.start < chunk.stop <= known:
                return (
                    f"{chunk.request}[{chunk.start}:{chunk.stop}] is no span of its {known} tokens"
                )
        return ""

    def is_over(self, name: str) -> bool:
        """Whether a request has ended, or was in the scheduler and left it."""
        seq = self._requests.found.get(name)
        return name in self.seen if seq is None else seq.status in ENDED


def named(step: PlanStep) -> list[str]:
    """The requests that a step as LMDeploy can run it has rows for."""
    return [chunk.request for chunk in step.prefill] or list(step.decode)


def only(step: PlanStep, names: set[str]) -> PlanStep:
    """What a step does for some of its requests, to be done after it."""
    chunks = tuple(chunk for chunk in step.prefill if chunk.request in names)
    decode = tuple(name for name in step.decode if name in names)
    return evolve(step, kv=(), prefill=chunks, decode=decode)
