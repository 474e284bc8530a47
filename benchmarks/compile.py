"""Speed of the compiler: requests -> plan, phase by phase, and how it grows with their number.

    python benchmarks/compile.py --trace mooncake_conversation.jsonl.xz
    python benchmarks/compile.py --sizes 1000,10000,100000,1000000 --plot docs/images/compile.svg

Without a trace file it compiles a random workload of the same shape (`workload.py`). One thread; each
row is the best of `--repeat` runs. As in `compile_requests`, the cyclic collector rests meanwhile.
Phases and `total` are seconds of the clock; `cpu` is the processor time of all of it, which neighbours on
the machine disturb less: growth is told, and plotted, by it.
"""

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path

from machine import describe
from rich.console import Console
from rich.table import Table
from workload import conversations

from sagellm_ir.build import build
from sagellm_ir.collecting import no_collections
from sagellm_ir.lowering.lower import lower
from sagellm_ir.passes.instruments import Timing
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.presets import load_target
from sagellm_ir.request import Request
from sagellm_ir.requests import load_requests
from sagellm_ir.target import Target

Phases = dict[str, float]


@no_collections()
def compile_once(requests: list[Request], target: Target, pipeline: str) -> tuple[Phases, Phases]:
    """Seconds of each phase, and what came out: what `compile_requests` does, taken apart."""
    timing = Timing()
    manager = PassManager(Pipeline.parse(pipeline), (timing,))
    cpu, began = time.process_time(), time.perf_counter()
    built = build(requests, target)
    after_build = time.perf_counter()
    graph = manager.run(built.graph)
    after_passes = time.perf_counter()
    plan = lower(graph, built.tokens)
    done = time.perf_counter()
    phases = {"build": after_build - began}
    for row in timing.rows:
        phases[row.spec] = row.seconds
    verifying = after_passes - after_build - sum(row.seconds for row in timing.rows)
    phases |= {"verify": verifying, "lower": done - after_passes, "total": done - began}
    phases["cpu"] = time.process_time() - cpu
    facts = {"nodes": len(graph.nodes), "steps": len(plan.steps)}
    return phases, {name: float(value) for name, value in facts.items()}


def best(requests: list[Request], target: Target, pipeline: str, repeat: int) -> dict[str, Phases]:
    """The run that took the least processor time."""
    runs = [compile_once(requests, target, pipeline) for _ in range(repeat)]
    phases, facts = min(runs, key=lambda run: run[0]["cpu"])
    return {"seconds": phases, "facts": facts}


def show(name: str, requests: list[Request], result: dict[str, Phases]) -> None:
    """One workload as a table."""
    facts = result["facts"]
    title = (
        f"{name}: {len(requests)} requests, {facts['nodes']:.0f} nodes, {facts['steps']:.0f} steps"
    )
    table = Table("phase", title=title, title_justify="left")
    table.add_column("ms", justify="right")
    for phase, seconds in result["seconds"].items():
        table.add_row(phase, f"{seconds * 1e3:.1f}", style="bold" if phase == "total" else "")
    Console(width=100).print(table)


def plot(sizes: list[int], totals: list[float], path: Path) -> None:
    """Total time over the number of requests, on double logarithmic axes, beside a linear line."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.loglog(sizes, totals, "o-", label="requests to plan, O2")
    linear = [totals[0] * size / sizes[0] for size in sizes]
    axes.loglog(sizes, linear, "--", color="grey", label="linear")
    axes.set_xlabel("requests")
    axes.set_ylabel("seconds of one core")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", help="a trace file; without it a random workload")
    parser.add_argument("--sizes", default="1000,3000,10000", help="random workloads to compile")
    parser.add_argument("--pipeline", default="O2")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--mixed", action="store_true", help="let a step hold prefills and decodes")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--plot", type=Path, help="write the growth as a picture")
    parser.add_argument("--json", type=Path, help="write all figures")
    arguments = parser.parse_args()
    if arguments.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    overrides = {"mixed": True} if arguments.mixed else {}
    target = load_target(arguments.target, block_size=512, **overrides)
    report: dict[str, object] = {
        "machine": describe("attrs", "numpy"),
        "pipeline": arguments.pipeline,
        "target": f"{target.name}, {'mixed' if target.mixed else 'unmixed'} steps",
        "seed": arguments.seed,
    }
    Console(stderr=True).print(report, highlight=False)
    compile_once(conversations(100, seed=0), target, arguments.pipeline)  # imports what is lazy
    workloads: dict[str, dict[str, Phases]] = {}
    if arguments.trace:
        began = time.perf_counter()
        requests = list(load_requests([arguments.trace]).requests)
        loading = time.perf_counter() - began
        result = best(requests, target, arguments.pipeline, arguments.repeat)
        result["seconds"] = {"load file": loading} | result["seconds"]
        show(Path(arguments.trace).name, requests, result)
        workloads[Path(arguments.trace).name] = result
    sizes = [int(float(size)) for size in arguments.sizes.split(",") if size]
    totals = []
    for size in sizes:
        requests = conversations(size, seed=arguments.seed)
        result = best(requests, target, arguments.pipeline, arguments.repeat)
        show("random conversations", requests, result)
        workloads[f"random {size}"] = result
        totals.append(result["seconds"]["cpu"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report | {"workloads": workloads}, indent=2))
    if arguments.plot and sizes:
        plot(sizes, totals, arguments.plot)


if __name__ == "__main__":
    main()
