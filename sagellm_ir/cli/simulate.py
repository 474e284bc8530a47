"""`run --backend simulator`: a plan in virtual time."""

import math
from pathlib import Path

from attrs import asdict
from rich.table import Table

from sagellm_ir.cli import shared
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.runtime.engines.simulator import SimulationReport, SimulatorEngine
from sagellm_ir.runtime.trace import recording

__all__ = ["simulate"]


def simulate(plan: ExecutionPlan, as_json: bool, output: Path | None, trace: Path | None) -> None:
    """Runs a plan on the simulator; prints when each request is answered, or all as JSON."""
    engine = SimulatorEngine(plan.target)
    with shared.working("simulating"), recording(engine, plan.target.block_size, trace):
        report = engine.execute(plan)
    if as_json or output is not None:
        shared.emit_json({"summary": _summary(report), **asdict(report)}, output)
        return
    shared.print_table(
        "Requests, in virtual time",
        ("id", "arrival s", "first token s", "finish s", "prompt", "computed", "new"),
        (
            (
                request.id,
                f"{request.arrival:.3f}",
                "" if request.first_token is None else f"{request.first_token:.3f}",
                "" if request.finish is None else f"{request.finish:.3f}",
                request.prompt_tokens,
                request.computed_tokens,
                request.generated,
            )
            for request in report.requests
        ),
    )
    table = Table(title="Summary, in virtual time", title_justify="left", show_header=False)
    for name, value in _summary(report).items():
        table.add_row(name.replace("_", " "), f"{value:g}")
    shared.stderr().print(table)


def _summary(report: SimulationReport) -> dict[str, float]:
    """Seconds, rates a second, and shares."""
    waits = sorted(request.ttft for request in report.requests if request.ttft is not None)
    return {
        "requests": len(report.requests),
        "seconds": round(report.seconds, 4),
        "steps": report.steps,
        "generated_tokens": report.generated,
        "tokens_per_second": round(report.throughput, 2),
        "hit_ratio": round(report.hit_ratio, 4),
        "ttft_mean": round(sum(waits) / len(waits), 4) if waits else 0.0,
        "ttft_p99": round(waits[math.ceil(0.99 * len(waits)) - 1], 4) if waits else 0.0,
        "spilled_blocks": report.spilled_blocks,
        "reloaded_blocks": report.reloaded_blocks,
        "handed_over_blocks": report.handed_over_blocks,
    }
