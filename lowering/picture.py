"""A plan as a picture: Graphviz text, the steps of each worker in a row."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from sagellm_ir.lowering.plan import ExecutionPlan, KVMove, PlanStep
from sagellm_ir.lowering.render import StepRow, plan_rows
from sagellm_ir.picture import COLOURS, OTHER, dot_text

__all__ = ["plan_dot"]

_MOST = 6
"""Names that a box lists; the others are counted."""


def plan_dot(plan: ExecutionPlan) -> str:
    """A box a step: what it runs, which prefixes its rows share, what it moves.

    Workers are clusters. A step points to the next one of its worker; a dashed edge is KV that
    comes from another worker.
    """
    lines = [f"digraph {dot_text(plan.name)} {{", "  rankdir = LR;"]
    lines.append('  node [shape = box, style = "rounded,filled", fontname = "monospace"];')
    rows = list(zip(plan.steps, plan_rows(plan), strict=True))
    for number, worker in enumerate(plan.target.workers):
        mine = [(step, row) for step, row in rows if step.worker == worker.name]
        lines += [f"  subgraph cluster_{number} {{", f"    label = {dot_text(worker.name)};"]
        for step, row in mine:
            colour = COLOURS["prefill" if step.prefill else "decode"] if step.loops else OTHER
            label = dot_text(*_label(step, row))
            lines.append(f'    s{step.index} [label = {label}, fillcolor = "{colour}"];')
        lines += [f"    s{a.index} -> s{b.index};" for (a, _), (b, _) in pairwise(mine)]
        lines.append("  }")
    lines += [f"  s{a} -> s{b} [style = dashed];" for a, b in _crossings(plan)]
    return "\n".join([*lines, "}"])


def _label(step: PlanStep, row: StepRow) -> Iterator[str]:
    yield f"step {step.index}: {row.start * 1e3:.1f} ms + {row.seconds * 1e3:.1f} ms"
    if step.prefill:
        yield f"prefill {_some([f'{c.request}[{c.start}:{c.stop}]' for c in step.prefill])}"
    if step.decode:
        yield f"decode {_some(step.decode)} x{step.loops}"
    for group in step.groups:
        yield f"share [{group.start}:{group.stop}] {_some(group.requests)}"
    if row.moved:
        yield f"move {row.moved}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST
    return " ".join(names[:_MOST]) + (f" and {more} more" if more > 0 else "")


def _crossings(plan: ExecutionPlan) -> Iterator[tuple[int, int]]:
    """The last step of a worker before a step that takes KV from it, and that step."""
    latest: dict[str, int] = {}
    for step in plan.steps:
        moves = [action for action in step.kv if isinstance(action, KVMove)]
        for origin in dict.fromkeys(move.from_worker for move in moves):
            if origin is not None and origin in latest:
                yield latest[origin], step.index
        latest[step.worker] = step.index
