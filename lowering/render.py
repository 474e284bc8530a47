"""A plan for people: rows of a table, bars of a timeline, and a Mermaid Gantt chart."""

from collections.abc import Iterator

from attrs import frozen

from sagellm_ir.lowering.plan import ExecutionPlan, KVFree, KVMove, PlanStep
from sagellm_ir.target import DEVICE

__all__ = ["Bar", "StepRow", "plan_bars", "plan_mermaid", "plan_rows", "plan_text"]


_PREFILL, _DECODE = 4, 5
"""The columns that name requests, and so can be wide."""
_LEAST = 12
"""Characters that each of them gets in the narrowest terminal."""


@frozen
class StepRow:
    """One step as a line of a table."""

    index: int
    worker: str
    start: float
    """Predicted seconds since the plan's start; workers run side by side."""
    seconds: float
    prefill: str
    """`r0[0:512]` for each chunk."""
    decode: str
    """`r0 r1 x4`: the requests, and the forwards when there are several."""
    shared: int
    """KV tokens that grouped rows do not read again."""
    moved: str
    """`12 host>device`: blocks between tiers; `8 w0>w1`: between workers."""
    used: int
    """Blocks of the worker's device that hold something while the step runs."""


@frozen
class Bar:
    """What one request does over some neighbouring steps."""

    request: str
    kind: str
    """`prefill` or `decode`."""
    first: int
    last: int
    """Steps, both included."""
    start: float
    stop: float
    """Predicted seconds."""


def plan_rows(plan: ExecutionPlan) -> Iterator[StepRow]:
    """The steps of a plan, one row each; columns in the order of the fields."""
    clock = dict.fromkeys((worker.name for worker in plan.target.workers), 0.0)
    default = plan.target.workers[0].name
    held: dict[str, set[int]] = {name: set() for name in clock}
    for resident in plan.resident:
        if resident.tier == DEVICE:
            held[resident.worker or default].update(resident.blocks)
    for live in plan.live:
        held[live.worker or default].add(live.block)
    for step in plan.steps:
        for action in step.kv:
            if isinstance(action, KVFree):
                if action.tier == DEVICE:
                    held[action.worker or step.worker].difference_update(action.blocks)
            else:
                origin = action.from_worker or step.worker
                clock[step.worker] = max(clock[step.worker], clock[origin])
                if action.to_tier == DEVICE:
                    held[step.worker].update(action.dst)
        for bind in step.binds:
            held[step.worker].update(bind.blocks)
        yield StepRow(
            step.index,
            step.worker,
            clock[step.worker],
            step.cost,
            " ".join(f"{c.request}[{c.start}:{c.stop}]" for c in step.prefill),
            " ".join(step.decode) + (f" x{step.loops}" if step.loops > 1 else ""),
            sum((len(g.requests) - 1) * (g.stop - g.start) for g in step.groups),
            _moved(step),
            len(held[step.worker]),
        )
        clock[step.worker] += step.cost


def plan_bars(plan: ExecutionPlan) -> list[Bar]:
    """When each request runs, by request, then by time. Steps without a gap make one bar."""
    bars: dict[str, list[Bar]] = {request.id: [] for request in plan.requests}
    turn: dict[str, int] = {}
    """Steps of a worker so far: neighbours of a worker are neighbours in its own count."""
    ended: dict[str, int] = {}
    for row, step in zip(plan_rows(plan), plan.steps, strict=True):
        number = turn[step.worker] = turn.get(step.worker, 0) + 1
        stop = row.start + row.seconds
        rows = [(chunk.request, "prefill") for chunk in step.prefill]
        for name, kind in [*rows, *((name, "decode") for name in step.decode)]:
            mine = bars[name]
            if mine and mine[-1].kind == kind and ended[name] == number - 1:
                last = mine.pop()
                mine.append(Bar(name, kind, last.first, step.index, last.start, stop))
            else:
                mine.append(Bar(name, kind, step.index, step.index, row.start, stop))
            ended[name] = number
    return [bar for mine in bars.values() for bar in mine]


def plan_text(plan: ExecutionPlan, width: int | None = None) -> str:
    """The rows as plain aligned columns.

    Args:
        width: of a terminal; the names of requests are cut to fit it. None: all are shown.
    """
    head = ("step", "worker", "start", "ms", "prefill", "decode", "shared", "moved", "used")
    lines = [head]
    for row in plan_rows(plan):
        start, milliseconds = f"{row.start * 1e3:.2f}", f"{row.seconds * 1e3:.2f}"
        texts = (row.prefill, row.decode, str(row.shared or ""), row.moved, str(row.used))
        lines.append((str(row.index), row.worker, start, milliseconds, *texts))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if width is not None:
        widths[_PREFILL : _DECODE + 1] = _fitted(widths, width)
    right = {0, 2, 3, 6, 8}
    return "\n".join(
        "  ".join(
            text.rjust(size) if place in right else _cut(text, size).ljust(size)
            for place, (text, size) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _fitted(widths: list[int], width: int) -> tuple[int, int]:
    """Widths of the columns `prefill` and `decode`, so that all of them take `width` if they can."""
    prefill, decode = widths[_PREFILL], widths[_DECODE]
    others = sum(widths) - prefill - decode + 2 * (len(widths) - 1)
    room = max(width - others, 2 * _LEAST)
    first = min(prefill, max(room // 2, room - decode))
    return first, min(decode, room - first)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def plan_mermaid(plan: ExecutionPlan) -> str:
    """The bars as a Mermaid Gantt chart, a section a request, in milliseconds.

    Mermaid reads `:`, `;`, `,` and `#` as syntax, so names show them as `_`.
    """
    lines = ["gantt", f"  title {_plain(plan.name)}", "  dateFormat x", "  axisFormat %S.%L"]
    section = None
    for bar in plan_bars(plan):
        if bar.request != section:
            section = bar.request
            lines.append(f"  section {_plain(section)}")
        start, stop = round(bar.start * 1e3), round(bar.stop * 1e3)
        active = "active, " if bar.kind == "prefill" else ""
        lines.append(f"  {bar.kind} : {active}{start}, {max(stop, start + 1)}")
    return "\n".join(lines) + "\n"


def _moved(step: PlanStep) -> str:
    moves = [action for action in step.kv if isinstance(action, KVMove)]
    count: dict[str, int] = {}
    for move in moves:
        way = f"{move.from_tier}>{move.to_tier}"
        if move.from_worker:
            way = f"{move.from_worker}>{step.worker}"
        count[way] = count.get(way, 0) + len(move.src)
    return ", ".join(f"{blocks} {way}" for way, blocks in count.items())


def _plain(name: str) -> str:
    return "".join("_" if character in ":;,#\n" else character for character in name)
