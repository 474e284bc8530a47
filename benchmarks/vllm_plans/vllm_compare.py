"""Default vLLM beside vLLM driven by plans: one machine, one run, taking turns.

Each side is a process of its own, with the same weights, prompts, pool, budgets and driver; they differ in
the scheduler. Default vLLM has its prefix caching on. Only one of them works at a time. On request
(`--sides`): `served`, plans by our engine (`SageLLMEngine`), as our server has them, instead of by vLLM's
own entry point, its sessions coroutines beside the engine's thread; and `plans without kernels`, on a
GPU, with vLLM's own attention.

    OMP_WAIT_POLICY=PASSIVE build/vllm/0.32.0/bin/python benchmarks/vllm.py --json out.json

On a GPU, where vLLM has it:

    python benchmarks/vllm.py --model FOLDER --dtype bfloat16 --target h100 --scale 8 --block-size 64 --blocks 384 --tokens 4096 \
        --settings '{"gpu_memory_utilization": 0.4}'          # all sides are on one device
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from attrs import asdict, define, field, frozen
from machine import describe
from rich.console import Console
from rich.table import Table
from vllm_workloads import WORKLOADS

from sagellm_ir.runtime.engines.embedded.export import model_folder
from sagellm_ir.runtime.engines.vllm.versions import check_version

SIDES = ("default", "plans", "served", "plans without kernels")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)


class Side:
    """A worker, and what is said to it."""

    def __init__(self, task: dict[str, Any]) -> None:
        worker = Path(__file__).with_name("vllm_worker.py")
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        ours, theirs = os.pipe()  # what libraries print is no result
        self._results = open(ours)  # noqa: SIM115
        self._process = subprocess.Popen(
            (sys.executable, worker, str(theirs)),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs,),
            text=True,
        )
        os.close(theirs)
        self._send(task)

    def hear(self) -> dict[str, Any]:
        """What it says next."""
        line = self._results.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self._log.read()}\na worker ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """A workload."""
        self._send(task)
        return self.hear()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._results.close()
        self._log.close()

    def _send(self, task: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        print(json.dumps(task), file=self._process.stdin, flush=True)


@frozen
class Figures:
    """One side of a workload, over all rounds; times in seconds."""

    prompts: int
    """Tokens of all prompts of the rounds."""
    computed: int
    """Of these, tokens that ran through the model."""
    forwards: int
    tokens_per_second: float
    """New tokens."""
    first_median: float
    """To the first token of a turn."""
    first_mean: float
    first_worst: float
    cpu_seconds: float
    """Of all threads of the process."""
    scheduler_median: float
    """A forward's scheduling, before and after it."""
    scheduler_p99: float
    scheduler_mean: float


@define
class Rounds:
    """One side of a workload."""

    runs: list[dict[str, Any]] = field(factory=list)

    def figures(self) -> Figures:
        def total(name: str) -> float:
            return sum(float(run[name]) for run in self.runs)

        answers = [answer for run in self.runs for answer in run["answers"].values()]
        made = sum(map(len, answers))
        first = [second for run in self.runs for second in run["first"]]
        spent = sorted(second for run in self.runs for second in run["spent"])
        return Figures(
            int(total("prompts")),
            int(total("tokens")) - made + len(answers),  # all but first tokens are decoded
            int(total("forwards")),
            made / total("seconds"),
            statistics.median(first),
            statistics.fmean(first),
            max(first),
            total("cpu_seconds"),
            statistics.median(spent),
            spent[int(len(spent) * 0.99)],
            statistics.fmean(spent),
        )


def mismatches(ours: Rounds, theirs: Rounds) -> tuple[int, int]:
    """Turns whose answers differ, and turns."""
    pairs = [
        (mine["answers"][name], answer)
        for mine, other in zip(ours.runs, theirs.runs, strict=True)
        for name, answer in other["answers"].items()
    ]
    return sum(mine != other for mine, other in pairs), len(pairs)


@contextmanager
def workers(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Side]]:
    """The workers, started at once."""
    sizes = {"device": {"blocks": args.blocks}, "host": {"blocks": args.host_blocks}}
    task = {
        "model": str(folder),
        "dtype": args.dtype,
        "target": args.target,
        "pipeline": args.pipeline,
        "settings": args.settings,
        "overrides": {
            "block_size": args.block_size,
            "max_tokens": args.tokens,
            "max_batch": args.batch,
            "tiers": sizes,
        },
    }
    with ExitStack() as stack:
        sides = {}
        for name in args.sides:
            sides[name] = Side({**task, "side": name})
            stack.callback(sides[name].close)
        yield sides


def measure(args: argparse.Namespace, sides: dict[str, Side]) -> dict[str, dict[str, Rounds]]:
    """Each workload on each side in turn, round after round, and back.

    What the round before the first gives is not looked at: forwards of new sizes are slow.
    """
    found = {work: {name: Rounds() for name in sides} for work in args.only}
    for seed in range(-1, args.rounds):
        for work, rounds in found.items():
            for name in sides if seed % 2 else reversed(sides):
                run = sides[name].run({"workload": work, "seed": seed, "scale": args.scale})
                if seed >= 0:
                    rounds[name].runs.append(run)
    return found


def report(found: dict[str, dict[str, Rounds]]) -> list[dict[str, Any]]:
    """A row for each side of each workload."""
    rows = []
    for work, rounds in found.items():
        for name, side in rounds.items():
            wrong, turns = mismatches(side, rounds["default"])
            row = {"workload": work, "side": name, **asdict(side.figures())}
            rows.append(row | {"differing_answers": wrong, "answers": turns})
    return rows


COLUMNS = ("workload", "side", "prompt", "computed", "forwards", "tokens/s", "TTFT s p50", "mean",
           "worst", "CPU s", "sched. ms p50", "p99", "mean", "differ")  # fmt: skip
FIRST = ("first_median", "first_mean", "first_worst", "cpu_seconds")


def show(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    default: dict[str, Any] = {}
    for row in rows:
        rate, differ = f"{row['tokens_per_second']:.1f}", ""
        if row["side"] == "default":
            default = row
        else:
            rate += f" ({row['tokens_per_second'] / default['tokens_per_second']:.2f})"
            differ = f"{row['differing_answers']} of {row['answers']}"
        table.add_row(
            row["workload"] if row is default else "",
            row["side"],
            *(f"{row[name]}" for name in ("prompts", "computed", "forwards")),
            rate,
            *(f"{row[name]:.2f}" for name in FIRST),
            *(f"{row[f'scheduler_{name}'] * 1e3:.2f}" for name in ("median", "p99", "mean")),
            differ,
        )
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a GGUF file")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--target", default="vllm-cpu", help="preset with the device's speeds")
    parser.add_argument("--pipeline", default="O2")
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON",
        help="more fields of vLLM's EngineArgs, for all sides",
    )  # fmt: skip
    parser.add_argument("--block-size", type=int, default=32, help="tokens")
    parser.add_argument("--blocks", type=int, default=96, help="of the pool")
    parser.add_argument("--host-blocks", type=int, default=256, help="that plans may spill to")
    parser.add_argument("--tokens", type=int, default=512, help="of a forward")
    parser.add_argument("--batch", type=int, default=8, help="rows of a forward")
    parser.add_argument("--scale", type=int, default=1, help="multiplies lengths")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:2]))
    parser.add_argument("--rounds", type=int, default=3, help="with new prompts each")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    facts = {"vllm": check_version(), **describe("torch", "transformers", "sagellm-ir")}
    with model_folder(args.model, args.dtype) as folder, workers(args, folder) as sides:
        for name, side in sides.items():
            facts[f"{name}_asynchronous"] = str(side.hear()["asynchronous"])
        found = measure(args, sides)
    rows = report(found)
    for name, fact in facts.items():
        console.print(f"{name}: {fact}")
    show(rows)
    if args.json:
        raw = {work: {n: r.runs for n, r in rounds.items()} for work, rounds in found.items()}
        args.json.write_text(json.dumps({"machine": facts, "rows": rows, "runs": raw}))


if __name__ == "__main__":
    main()
