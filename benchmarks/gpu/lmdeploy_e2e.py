"""LMDeploy end to end on one GPU: stock, patched without a plan, with plans, with plans and kernels.

    python benchmarks/gpu/lmdeploy_e2e.py --lmdeploy DIR --wheels DIR   # a CUDA machine
    python benchmarks/gpu/lmdeploy_e2e.py ... --gpus 2 --configs stock,patched   # side by side
    python benchmarks/gpu/lmdeploy_e2e.py --smoke                       # a CPU, without a model

Each configuration is a process of its own; all get the same weights (random, Qwen2.5-7B's shape) and
the same prompts, all greedy. `--lmdeploy` is the Python part of LMDeploy 0.11.0, unpatched; `--wheels`
a folder of what it imports and the machine lacks. A row that was measured is in the JSON at once.

Tokens are compared with stock's. In bf16 another batch is another order of additions, and with random
weights near ties are common; so the table has, for each row, how many answers differ in a token and
how many in the first, and at the end how often stock differs from itself in other batches.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "lmdeploy"
PLUGIN = "sagellm_ir.runtime.engines.lmdeploy.plugin:attach"
CONFIGS = ("stock", "patched", "plan", "plan+kernels")
ROWS = "0-9"
FIRST, HALVES = "64 x 1024, nothing shared", "64 x 1024, the first row's prompts in halves"
CHEAP = "0-2"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--lmdeploy", type=Path, help="folder that holds lmdeploy/, unpatched; build/lmdeploy/stock"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run")
    parser.add_argument("--model", type=Path, default=Path("/dev/shm/random-qwen2.5-7b"))
    parser.add_argument(
        "--rows",
        default="",
        help="numbers, as 0x3,1-4,8: row 0 three times; or CONFIG=ROWS;CONFIG=ROWS",
    )
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument(
        "--gpus", type=int, default=1, help="so many configurations at the same time, in order"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after so long")
    parser.add_argument("--row-seconds", type=float, default=150.0, help="give a row up after")
    parser.add_argument("--cache", type=float, default=0.8, help="share of the free memory for KV")
    parser.add_argument("--out", type=Path, default=Path("build/lmdeploy_e2e.json"))
    parser.add_argument("--smoke", action="store_true", help="the CPU test's executor, no model")
    return parser.parse_args()


def rows_of(text: str, config: str) -> list[tuple[int, int]]:
    """The rows that a configuration runs, and how often."""
    choice = dict(part.split("=") for part in text.split(";") if "=" in part)
    text = choice.get(config, "" if choice else text) or (CHEAP if config == "patched" else ROWS)
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        rows, _, times = part.partition("x")
        first, _, last = rows.partition("-")
        found += ((row, int(times or 1)) for row in range(int(first), int(last or first) + 1))
    return found


def prepare(args: argparse.Namespace, work: Path) -> dict[str, str]:
    """Install what is missing, make both trees and the weights; PYTHONPATH by configuration."""
    path = [str(ROOT), str(HERE)]
    if args.wheels:
        site = work / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--no-compile", "--no-cache-dir", "--target", str(site)]
        subprocess.run([*command, *map(str, args.wheels.glob("*.whl"))], check=True)
        path.append(str(site))
    if args.smoke:
        path.append(str(BUILD / "site"))
    stock, patched = work / "stock", work / "patched"
    for tree in (stock, patched):
        shutil.copytree((args.lmdeploy or BUILD / "stock") / "lmdeploy", tree / "lmdeploy")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    patching = [sys.executable, "-m", "sagellm_ir.runtime.engines.lmdeploy.patching", "apply"]
    subprocess.run([*patching, "--target", str(patched)], check=True, env=environment)
    if not args.smoke and not (args.model / "tokenizer.json").is_file():
        subprocess.run(
            [sys.executable, str(Path(__file__)), "make-model", str(args.model)],
            check=True,
            env=environment,
        )
    trees = {config: stock if config == "stock" else patched for config in CONFIGS}
    return {config: os.pathsep.join([str(tree), *path]) for config, tree in trees.items()}


def environment_of(config: str, path: str) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("LMDEPLOY_LOG_LEVEL", "WARNING")
    if config.startswith("plan"):
        environment["LMDEPLOY_PYTORCH_PLUGIN"] = PLUGIN
        environment["SAGELLM_ACCEL__MODE"] = "auto" if "kernels" in config else "off"
    return environment


def task_of(args: argparse.Namespace, config: str, done: list[str], work: Path) -> dict[str, Any]:
    """What a worker is told. Stock judges where the answers of those that are done part from its own."""
    judged = done if config == "stock" and not args.smoke else []
    return {
        "config": config,
        "rows": rows_of(args.rows, config),
        "model": str(args.model),
        "cache": args.cache,
        "smoke": args.smoke,
        "row_seconds": args.row_seconds,
        "results": str(work / f"{config}.jsonl"),
        "judge": [str(work / f"{other}.jsonl") for other in judged],
    }


def start(task: dict[str, Any], path: str, gpu: int) -> "subprocess.Popen[bytes]":
    """A configuration in a process of its own."""
    command = [sys.executable, str(HERE / "lmdeploy_worker.py"), json.dumps(task)]
    environment = environment_of(task["config"], path)
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return subprocess.Popen(command, env=environment)


def outcome(worker: "subprocess.Popen[bytes]", until: float) -> str:
    """Wait for a worker, but not longer than until a time of the monotonic clock."""
    try:
        code = worker.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return "ran out of time"
    return f"ended with {code}" if code else "done"


def main() -> None:
    args = options()
    until = time.monotonic() + args.minutes * 60
    args.out.parent.mkdir(parents=True, exist_ok=True)
    configs = args.configs.split(",")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        began = time.monotonic()
        paths = prepare(args, work)
        print(f"prepared in {time.monotonic() - began:.0f} s", flush=True)
        for first in range(0, len(configs), args.gpus):
            done, group = configs[:first], configs[first : first + args.gpus]
            workers = [
                start(task_of(args, config, done, work), paths[config], gpu)
                for gpu, config in enumerate(group)
            ]
            for config, worker in zip(group, workers, strict=True):
                print(f"{config}: {outcome(worker, until)}", flush=True)
            report = collect(work, configs)
            args.out.write_text(json.dumps(report, indent=1))
    print(table(report))


def collect(work: Path, configs: list[str]) -> dict[str, Any]:
    """What was measured so far, with the tokens compared."""
    measured: dict[str, Any] = {}
    for config in configs:
        file = work / f"{config}.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        measured[config] = {entry["row"]: entry for entry in map(json.loads, lines)}
    stock = measured.get("stock", {})
    report: dict[str, Any] = {}
    for config, entries in measured.items():
        report[config] = {}
        for row, entry in entries.items():
            figures = {key: value for key, value in entry.items() if key != "tokens"}
            if config != "stock" and row in stock and "tokens" in entry:
                figures["tokens"] = compare(stock[row]["tokens"], entry["tokens"])
                figures["speedup"] = round(stock[row]["wall_s"] / entry["wall_s"], 3)
            report[config][row] = figures
    if (first := stock.get(FIRST)) and (halves := stock.get(HALVES)):
        report["stock"][HALVES]["tokens"] = compare(first["tokens"], halves["tokens"])
    return report


def compare(expected: dict[str, list[int]], got: dict[str, list[int]]) -> dict[str, float]:
    """How answers differ: in any token, in the first; and differences by token up to the first."""
    different = first = seen = 0
    for name, tokens in expected.items():
        other = got.get(name, [])
        equal = next(
            (at for at, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b),
            min(len(tokens), len(other)),
        )
        whole = equal == len(tokens) == len(other)
        different += not whole
        first += equal == 0
        seen += equal + (not whole)
    rate = round(different / seen, 5) if seen else 0.0
    return {"answers": len(expected), "differ": different, "first": first, "per_token": rate}


def table(report: dict[str, Any]) -> str:
    """All rows of all configurations."""
    head = f"{'row':46}{'config':14}{'wall s':>8}{'x stock':>8}{'TTFT':>8}{'p99':>8}{'TPOT ms':>8}{'tok/s':>8}{'tick p50/p99 ms':>16}  differ/first/per token"
    lines = [head]
    rows = dict.fromkeys(row for entries in report.values() for row in entries)
    for row in rows:
        for config, entries in report.items():
            if row not in entries or "wall_s" not in entries[row]:
                continue
            seen = entries[row]
            tick = f"{seen['tick_p50_ms']:.2f}/{seen['tick_p99_ms']:.2f}"
            tokens = seen.get("tokens")
            words = (
                ""
                if tokens is None
                else "/".join(str(tokens[key]) for key in ("differ", "first", "per_token"))
            )
            lines.append(
                f"{row:46}{config:14}{seen['wall_s']:8.2f}{seen.get('speedup', 1.0):8.2f}{seen['ttft_mean_s']:8.3f}"
                f"{seen['ttft_p99_s']:8.3f}{seen['tpot_mean_ms']:8.2f}{seen['output_tok_s']:8.0f}{tick:>16}  {words}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["make-model"]:
        from random_model import QWEN2_5_7B, write_model

        write_model(QWEN2_5_7B, Path(sys.argv[2]))
    else:
        main()
