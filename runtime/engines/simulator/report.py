"""`SimulationReport`: what a run cost in virtual time."""

from attrs import frozen

__all__ = ["RequestReport", "SimulationReport"]


@frozen
class RequestReport:
    """One request in virtual time; seconds since the start of the workload."""

    id: str
    arrival: float
    first_token: float | None
    finish: float | None
    """When its last token came; None while it has not."""
    prompt_tokens: int
    computed_tokens: int
    """Prompt tokens that its own prefills computed; the rest was shared or cached."""
    generated: int

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds."""
        return None if self.first_token is None else self.first_token - self.arrival


@frozen
class SimulationReport:
    """What a run cost in virtual time."""

    seconds: float
    """From the start of the workload to the end of the last step."""
    busy_seconds: float
    """Time steps took, summed over the workers."""
    requests: tuple[RequestReport, ...]
    steps: int
    forwards: int
    prefill_tokens: int
    generated: int
    spilled_blocks: int
    """Moved off the device by eviction."""
    reloaded_blocks: int
    handed_over_blocks: int
    """Copied from one worker to another."""
    moved_bytes: int

    @property
    def throughput(self) -> float:
        """Generated tokens a second."""
        return self.generated / self.seconds if self.seconds else 0.0

    @property
    def hit_ratio(self) -> float:
        """Prompt tokens that were shared or cached, over all prompt tokens of answered requests."""
        answered = [request for request in self.requests if request.first_token is not None]
        total = sum(request.prompt_tokens for request in answered)
        computed = sum(request.computed_tokens for request in answered)
        return max(0.0, 1 - computed / total) if total else 0.0
