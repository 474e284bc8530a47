"""Laws of stages and of schedules: what is set when, and what may run in which step."""

from collections.abc import Iterator

import numpy as np

from sagellm_ir.arrays import NONE, Ints, Mask, places
from sagellm_ir.columns import Columns
from sagellm_ir.nodes import Decode
from sagellm_ir.verify.report import Finding

__all__ = ["SCHEDULE_LAWS", "STAGE_LAWS", "step_workers"]


def no_steps_yet(c: Columns) -> Iterator[Finding]:
    """Before `schedule`, nothing has a step."""
    stage = c.graph.stage
    if stage == "scheduled":
        return
    if c.graph.loops:
        yield Finding(f"a {stage} graph has no steps yet")
    for i in places(np.maximum(c.step, c.finish) != NONE):
        yield Finding(f"a node of a {stage} graph has no step yet", i)


def workers_of_stage(c: Columns) -> Iterator[Finding]:
    """Workers are set by placing: on no node of a built graph, on all of a placed one.

    A single worker need not be named: then it is named on no node.
    """
    stage, unset = c.graph.stage, c.worker == NONE
    if stage == "built":
        for i in places(~unset):
            yield Finding("a node of a built graph has no worker yet", i)
    elif not unset.all() or (stage == "placed" and len(c.graph.target.workers) > 1):
        for i in places(unset):
            yield Finding(f"a node of this {stage} graph has no worker", i)


def steps_set(c: Columns) -> Iterator[Finding]:
    """In a scheduled graph every node has a step, and a decode the step it ends in."""
    if c.graph.stage != "scheduled":
        return
    steps = len(c.graph.loops)
    late = (c.finish < c.step) | (c.finish >= steps)
    for i in places((c.step < 0) | late):
        node = c.nodes[i]
        if node.step is None:
            message = "a node of a scheduled graph has no step"
        elif isinstance(node, Decode) and node.until is not None and node.until < node.step:
            message = f"the decode ends in step {node.until}, before it starts in {node.step}"
        else:
            message = f"step {max(c.step[i], c.finish[i])} is not among the graph's {steps} steps"
        yield Finding(message, i)
    for i in places(c.is_decode & (c.until == NONE)):
        yield Finding("a decode of a scheduled graph has no 'until'", i)
    limit = c.graph.target.max_loops
    if 0 <= min(c.graph.loops, default=0) <= max(c.graph.loops, default=0) <= limit:
        return
    for step, loops in enumerate(c.graph.loops):
        if not 0 <= loops <= limit:
            yield Finding(f"step {step} has {loops} forwards: expected 0 to {limit} (max_loops)")


STAGE_LAWS = (no_steps_yet, workers_of_stage, steps_set)


def step_workers(c: Columns) -> Ints:
    """The worker of each step: that of what starts in it; when nothing does, that of the step
    before, as long as it has decodes to run, else the first one that has."""
    steps, workers = len(c.graph.loops), len(c.graph.target.workers)
    owners: Ints = np.zeros(steps, dtype=np.int64)
    if workers == 1 or not steps:
        return owners
    worker = np.maximum(c.worker, 0)
    started: Ints = np.full(steps, NONE, dtype=np.int64)
    started[c.step] = worker
    running = _running(c, c.is_decode)
    current = 0
    for step in range(steps):
        if started[step] != NONE:
            current = int(started[step])
        elif not running[current, step] and running[:, step].any():
            current = int((running[:, step] > 0).argmax())
        owners[step] = current
    return owners


def _running(c: Columns, nodes: Mask) -> Ints:
    """For each worker and step, how many of some nodes run then, from step to finish."""
    workers, steps = len(c.graph.target.workers), len(c.graph.loops) + 1
    first = np.maximum(c.worker[nodes], 0) * steps
    changes = np.bincount(first + c.step[nodes], minlength=workers * steps)
    changes -= np.bincount(first + c.finish[nodes] + 1, minlength=workers * steps)
    return changes.reshape(workers, steps).cumsum(axis=1)[:, :-1]


def operands_first(c: Columns) -> Iterator[Finding]:
    """A node runs after its operands.

    In one step, moves run first, in node order, then the forward. So in the step of an operand
    may run: what reads a moved value, a prefill chunk after a prefill chunk (each layer writes KV
    before attention reads it), and a decode that runs no forward.
    """
    user, operand = c.operands.user, c.operands.target
    same_step = c.is_move[operand] | (c.is_prefill[user] & c.is_prefill[operand])
    same_step |= c.is_decode[user] & (c.forwards[user] == 0)
    early = c.step[user] < c.finish[operand] + ~same_step
    for edge in places(early & ~c.is_allreduce[user]):
        yield _too_early(c, int(user[edge]), int(operand[edge]), "its operand")


def after_first(c: Columns) -> Iterator[Finding]:
    """A node runs in a step after what it is `after`; after a move, it may be the same step."""
    user, other = c.after.user, c.after.target
    for edge in places(c.step[user] < c.finish[other] + ~c.is_move[other]):
        yield _too_early(c, int(user[edge]), int(other[edge]), "what it is after,")


def _too_early(c: Columns, i: int, j: int, what: str) -> Finding:
    return Finding(
        f"%{c.names[i]} runs in step {c.step[i]}, but {what} %{c.names[j]} ends in step "
        f"{c.finish[j]}",
        i,
    )


def collectives_inside(c: Columns) -> Iterator[Finding]:
    """A collective starts in a step in which all its operands run, and none rests."""
    if not c.is_allreduce.any():
        return
    user, operand = c.operands.user, c.operands.target
    outside = (c.step[user] < c.step[operand]) | (c.step[user] > c.finish[operand])
    resting = c.decode_loops[c.step[user]] == 0
    outside |= resting & (c.forwards[operand] > 0)
    for edge in places(outside & c.is_allreduce[user]):
        i, j = int(user[edge]), int(operand[edge])
        yield Finding(f"%{c.names[j]} does not run in step {c.step[i]}, its collective does", i)


def step_on_one_worker(c: Columns) -> Iterator[Finding]:
    """All nodes of a step are on one worker."""
    if len(c.graph.target.workers) == 1:
        return
    owners, worker = step_workers(c), np.maximum(c.worker, 0)
    for i in places(owners[c.step] != worker):
        owner = c.graph.target.workers[owners[c.step[i]]].name
        yield Finding(f"step {c.step[i]} is of worker {owner!r}, not {c.nodes[i].worker!r}", i)


def decode_forwards(c: Columns) -> Iterator[Finding]:
    """A decode gets the forwards it needs: over its steps, on its worker, not one more.

    It starts and ends in steps in which it advances; in between it may rest (`decode_loops`).
    n tokens need n forwards, and n-1 when the prompt's last prefill yields the first token. With
    no forward to run, the decode is done in the step of that prefill.
    """
    decodes = np.flatnonzero(c.is_decode)
    owners, loops, count = step_workers(c), c.decode_loops, len(c.graph.target.workers)
    worker = np.maximum(c.worker[decodes], 0)
    step, until, needed = c.step[decodes], c.finish[decodes], c.forwards[decodes]
    done: Ints = np.zeros((count, len(loops) + 1), dtype=np.int64)
    mine = owners == np.arange(count)[:, np.newaxis]
    np.cumsum(loops * mine, axis=1, out=done[:, 1:])
    got = done[worker, until + 1] - done[worker, step]
    idle = (owners[until] != worker) | (owners[step] != worker)
    idle |= (loops[until] == 0) | (loops[step] == 0)
    for k in places((needed > 0) & ((got != needed) | idle)):
        ends = (
            ""
            if got[k] != needed[k]
            else ", but it starts or ends in a step in which it does not run"
        )
        yield Finding(
            f"the decode needs {needed[k]} forwards, and steps {step[k]} to {until[k]} "
            f"have {got[k]}{ends}",
            int(decodes[k]),
        )
    prefix = c.prefix[decodes]
    at_prefill = c.is_prefill[prefix] & (step != c.step[prefix])
    for k in places((needed == 0) & ((step != until) | at_prefill)):
        yield Finding(
            f"a decode without forwards is done in the step of its prefill, "
            f"{c.step[prefix[k]]}, not in steps {step[k]} to {until[k]}",
            int(decodes[k]),
        )


def step_budgets(c: Columns) -> Iterator[Finding]:
    """A step keeps to the target's tokens and sequences; with a prefill it has one forward.

    Decodes that rest take no room.
    """
    target, steps = c.graph.target, len(c.graph.loops)
    loops = c.loops
    rows = _running(c, c.is_decode & (c.forwards > 0))[step_workers(c), np.arange(steps)]
    rows[c.decode_loops == 0] = 0
    step, span = c.step[c.is_prefill], (c.stop - c.start)[c.is_prefill]
    tokens = np.bincount(step, weights=span, minlength=steps).astype(np.int64)
    pairs = np.sort(step * len(c.prompt) + c.request[c.is_prefill])
    distinct = np.ones(len(pairs), dtype=bool)
    distinct[1:] = pairs[1:] != pairs[:-1]
    sequences = np.bincount(pairs[distinct] // max(len(c.prompt), 1), minlength=steps)
    for k in places((sequences > 0) & (loops != 1)):
        yield Finding(f"step {k} has a prefill, so it has one forward, not {loops[k]}")
    for k in places(tokens + rows > target.max_tokens):
        yield Finding(
            f"step {k} computes {tokens[k] + rows[k]} tokens, max_tokens is {target.max_tokens}"
        )
    for k in places(sequences + rows > target.max_batch):
        yield Finding(
            f"step {k} runs {sequences[k] + rows[k]} sequences, max_batch is {target.max_batch}"
        )


SCHEDULE_LAWS = (
    operands_first,
    after_first,
    collectives_inside,
    step_on_one_worker,
    decode_forwards,
    step_budgets,
)
