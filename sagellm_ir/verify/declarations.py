"""Laws of what stands before the nodes: the target, the cache and the requests."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from sagellm_ir.diagnostics import suggest
from sagellm_ir.graph import STAGES
from sagellm_ir.target import DEVICE
from sagellm_ir.verify.columns import Columns
from sagellm_ir.verify.report import Finding

__all__ = ["LAWS"]


def known_stage(c: Columns) -> Iterator[Finding]:
    """The stage is one of those there are."""
    if c.graph.stage not in STAGES:
        yield Finding(f"unknown stage {c.graph.stage!r}", help=suggest(c.graph.stage, STAGES))


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def whole_target(c: Columns) -> Iterator[Finding]:
    """A target has a device tier and a worker, and no two of a name."""
    target = c.graph.target
    if target.tier(DEVICE) is None:
        yield Finding(f"target {target.name!r} has no tier {DEVICE!r}")
    if not target.workers:
        yield Finding(f"target {target.name!r} has no worker")
    for name in _twice(tier.name for tier in target.tiers):
        yield Finding(f"tier {name!r} is declared twice")
    for name in _twice(worker.name for worker in target.workers):
        yield Finding(f"worker {name!r} is declared twice")


def sound_figures(c: Columns) -> Iterator[Finding]:
    """Speeds and sizes of the target are positive, costs are not negative."""
    target, model, device = c.graph.target, c.graph.target.model, c.graph.target.device
    positive: dict[str, float] = {
        f"model's {name}": getattr(model, name)
        for name in (
            *("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab"),
            "dtype_bytes",
        )
    }
    for name in ("flops", "bandwidth", "allreduce_bandwidth"):
        positive[f"device's {name}"] = getattr(device, name)
    costs = {f"tier {tier.name!r}'s latency": tier.latency for tier in target.tiers}
    costs["device's step_overhead"] = device.step_overhead
    costs["device's allreduce_latency"] = device.allreduce_latency
    for what, value in positive.items():
        if not value > 0:
            yield Finding(f"the {what} must be positive, but is {value}")
    for what, value in costs.items():
        if not value >= 0:
            yield Finding(f"the {what} must not be negative, but is {value}")


def cache_lines(c: Columns) -> Iterator[Finding]:
    """Cache lines name tiers and workers of the target, and hold block ids."""
    for line in c.graph.cache:
        if line.tier not in c.tier_index:
            yield Finding(
                f"cache line names unknown tier {line.tier!r}",
                help=suggest(line.tier, c.tier_index),
            )
        if line.worker is not None and line.worker not in c.worker_index:
            yield Finding(
                f"cache line names unknown worker {line.worker!r}",
                help=suggest(line.worker, c.worker_index),
            )
        if line.blocks and min(line.blocks) < 0:
            yield Finding(f"cache line of {line.tier!r} holds a negative block id")
        if len(set(line.blocks)) < len(line.blocks):
            yield Finding(f"cache line of {line.tier!r} holds a block twice")


def unique_requests(c: Columns) -> Iterator[Finding]:
    """No two requests have one id."""
    if len(c.request_index) == len(c.graph.requests):
        return
    seen: set[str] = set()
    for request in c.graph.requests:
        if request.id in seen:
            yield Finding(f"request @{request.id} is declared twice", request=request)
        seen.add(request.id)


def _same_requests(c: Columns) -> bool:
    """Whether the requests were checked already."""
    known = c.known
    return (
        known is not None
        and known.requests is c.graph.requests
        and known.target.block_size == c.graph.target.block_size
    )


def whole_prompts(c: Columns) -> Iterator[Finding]:
    """A prompt has tokens, and one block id, used once, for each full block."""
    if _same_requests(c):
        return
    size = c.graph.target.block_size
    for request in c.graph.requests:
        blocks, full = request.blocks, request.prompt_len // size
        if request.prompt_len < 1:
            message = f"request @{request.id} has an empty prompt"
        elif len(blocks) != full:
            message = (
                f"request @{request.id} lists {len(blocks)} blocks, but its prompt of "
                f"{request.prompt_len} tokens has {full} full blocks of {size}"
            )
        elif blocks and min(blocks) < 0:
            message = f"request @{request.id} has a negative block id"
        elif len(set(blocks)) < full:
            message = f"request @{request.id} has one block id at two places of its prompt"
        else:
            continue
        yield Finding(message, request=request)


def sound_times(c: Columns) -> Iterator[Finding]:
    """Arrivals and deadlines are times."""
    if _same_requests(c):
        return
    for request in c.graph.requests:
        if not 0 <= request.arrival < math.inf:
            yield Finding(
                f"request @{request.id} arrives at {request.arrival}: expected seconds >= 0",
                request=request,
            )
        if request.deadline is not None and math.isnan(request.deadline):
            yield Finding(f"request @{request.id} has a deadline that is no time", request=request)


LAWS = (
    known_stage,
    whole_target,
    sound_figures,
    cache_lines,
    unique_requests,
    whole_prompts,
    sound_times,
)
