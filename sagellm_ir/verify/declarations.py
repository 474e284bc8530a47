"""Laws of what stands before the nodes: the target, the cache and the requests."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from sagellm_ir.arrays import Ints, places
from sagellm_ir.columns import Columns
from sagellm_ir.diagnostics import suggest
from sagellm_ir.graph import STAGES
from sagellm_ir.target import DEVICE
from sagellm_ir.verify.report import Finding

__all__ = ["LAWS", "REQUEST_LAWS"]


_IDS = 1 << 63
"""Block ids fit into 64 bits with a sign."""


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
        if line.blocks and not 0 <= min(line.blocks) <= max(line.blocks) < _IDS:
            yield Finding(f"cache line of {line.tier!r} holds a block id outside [0, 2**63)")
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


def whole_prompts(c: Columns) -> Iterator[Finding]:
    """A prompt has tokens, and one block id for each full block."""
    size = c.graph.target.block_size
    wrong = (c.prompt < 1) | (c.id_count != c.prompt // size)
    for at in places(wrong):
        request = c.graph.requests[at]
        if request.prompt_len < 1:
            yield Finding(f"request @{request.id} has an empty prompt", request=request)
        else:
            yield Finding(
                f"request @{request.id} lists {len(request.blocks)} blocks, but its prompt of "
                f"{request.prompt_len} tokens has {request.prompt_len // size} full blocks of {size}",
                request=request,
            )
    wrong = c.ids < 0
    for at in np.unique(_owners(c)[wrong]).tolist() if wrong.any() else ():
        request = c.graph.requests[at]
        message = f"request @{request.id} has a block id outside [0, 2**63)"
        yield Finding(message, request=request)


def _owners(c: Columns) -> Ints:
    """The request of each id in `ids`."""
    return np.repeat(np.arange(len(c.id_count)), c.id_count)


def chained_blocks(c: Columns) -> Iterator[Finding]:
    """A block id stands for a chain: wherever it occurs, the same block stands before it, and the
    first one belongs to one adapter and tenant. So no id stands twice in one prompt."""
    if not len(c.ids) or c.ids.min() < 0:
        return
    parent = np.empty_like(c.ids)
    parent[1:] = c.ids[:-1]
    some = c.id_count > 0
    parent[c.id_start[some]] = ~c.space[some]
    first = c.first_id
    owners = None
    for i in places(parent != parent[first]):
        owners = _owners(c) if owners is None else owners
        request, other = c.graph.requests[owners[i]], c.graph.requests[owners[first[i]]]
        here, there = _parent(int(parent[i])), _parent(int(parent[first[i]]))
        yield Finding(
            f"block id {c.ids[i]} {here} in @{request.id}, but {there} in @{other.id}",
            request=request,
            help="equal ids mean equal tokens, and equal everything before them",
        )


def _parent(parent: int) -> str:
    return f"follows {parent}" if parent >= 0 else f"begins prompts of namespace {~parent}"


def sound_times(c: Columns) -> Iterator[Finding]:
    """Arrivals and deadlines are times."""
    for request in c.graph.requests:
        if not 0 <= request.arrival < math.inf:
            yield Finding(
                f"request @{request.id} arrives at {request.arrival}: expected seconds >= 0",
                request=request,
            )
        if request.deadline is not None and math.isnan(request.deadline):
            yield Finding(f"request @{request.id} has a deadline that is no time", request=request)


LAWS = (known_stage, whole_target, cache_lines)

REQUEST_LAWS = (unique_requests, whole_prompts, chained_blocks, sound_times)
"""These depend on the requests and the block size alone."""
