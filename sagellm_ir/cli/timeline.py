"""A plan's timeline as text: a line a request, time from left to right."""

from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.lowering.render import plan_bars

__all__ = ["timeline"]

MARKS = {"prefill": "█", "decode": "▒"}
MOST_REQUESTS = 40


def timeline(plan: ExecutionPlan, width: int = 64) -> str:
    """Prefill as `█`, decode as `▒`; at most 40 requests."""
    bars = plan_bars(plan)
    end = max((bar.stop for bar in bars), default=0.0)
    if not end:
        return ""
    names = [request.id for request in plan.requests[:MOST_REQUESTS]]
    margin = max(len(name) for name in names)
    lines = {name: [" "] * width for name in names}
    for bar in bars:
        if bar.request in lines:
            first = min(int(bar.start / end * width), width - 1)
            last = max(int(bar.stop / end * width), first + 1)
            lines[bar.request][first:last] = MARKS[bar.kind] * (last - first)
    text = [f"{name:>{margin}} {''.join(marks).rstrip()}" for name, marks in lines.items()]
    if len(plan.requests) > MOST_REQUESTS:
        text.append(f"{'':>{margin}} ... and {len(plan.requests) - MOST_REQUESTS} more requests")
    scale = f"{'':>{margin}} 0 ms{f'{end * 1e3:.1f} ms':>{width - 4}}"
    return "\n".join([*text, scale, f"{'':>{margin}} █ prefill  ▒ decode (predicted time)"])
