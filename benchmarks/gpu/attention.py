"""Prefix-aware attention against other kernels on one GPU.

    python benchmarks/gpu/attention.py           # a CUDA machine; --help for shorter runs
    python benchmarks/gpu/attention.py --smoke   # anywhere, in Triton's interpreter

First correctness: random inputs, NaN around whatever must not be read, outputs and workspace
poisoned. Only when all of it passes, time: CUDA graph replay with a cold L2, median. The table
has every row, lost ones too. The JSON has the table and the rates of the device, also those that
`Gate` assumes; a second run adds the rows that it lacks.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Before anything imports triton.

import torch
import triton
from attrs import asdict
from peers import PEERS, Unsuitable
from timing import Timer, device_rates
from workloads import HEADS, Workload, correctness, decode, extend, prefill, smoke, trees

from sagellm_ir.runtime.accel import AttentionSpec, Gate, SharedPrefix
from sagellm_ir.runtime.accel.attention import PrefixAttention
from sagellm_ir.runtime.accel.selfcheck import Batch, largest_error, random_batch, tolerance

Rates = dict[str, float]


def attention(work: Workload, device: str, gate: Gate | None) -> PrefixAttention:
    return PrefixAttention(
        work.spec,
        max_batch=256,
        max_rows=max(256, sum(work.q_lens)),
        device=device,
        gate=gate,
        workspace=128 << 20 if device.startswith("cuda") else 1 << 20,
    )


def check(works: list[Workload], device: str) -> bool:
    """Print what is wrong; whether nothing is."""
    good = True
    for number, work in enumerate(works):
        batch = random_batch(
            *(work.spec, work.q_lens, work.kv_lens, work.groups), device=device, seed=number
        )
        for groups in (work.groups, ()):
            batch.groups[:] = groups
            error = largest_error(attention(work, device, None), batch)
            if not error < tolerance(work.spec):  # NaN is wrong too.
                good = False
                print(f"WRONG by {error:.3g}: {work.name}, {len(groups)} groups")
    print(f"correctness: {len(works)} batches, {'all right' if good else 'FAILED'}", flush=True)
    return good


def ours(
    timer: Timer, work: Workload, batch: Batch, gate: Gate | None
) -> tuple[float, PrefixAttention]:
    """Seconds of a layer: `schedule` runs once a forward, so it is not part of it.

    What the last replay left is compared with one more run.
    """
    kernels = attention(work, str(batch.q.device), gate)
    kernels.update(work.q_lens, work.kv_lens, work.groups)
    kernels.schedule(batch.lengths)
    out = torch.empty_like(batch.q)
    seconds, _ = timer.seconds(lambda: run(kernels, batch, out))
    again = run(kernels, batch, torch.full_like(out, math.nan))
    if not float((again - out).abs().max()) < tolerance(work.spec):
        raise AssertionError(f"{work.name}: a replayed graph and a plain run differ")
    return seconds, kernels


def run(kernels: PrefixAttention, batch: Batch, out: torch.Tensor) -> torch.Tensor:
    return kernels.run(
        *(batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.lengths, out),
        **batch.extra,
    )


def measure(
    timer: Timer, work: Workload, device: str, gate: Gate | None, rates: Rates
) -> dict[str, Any]:
    """One row: ours with the gate; without sharing; every peer."""
    batch = random_batch(
        *(work.spec, work.q_lens, work.kv_lens, work.groups), device=device, poison=False
    )
    time, kernels = ours(timer, work, batch, gate)
    expected = run(kernels, batch, torch.empty_like(batch.q))
    memory = max(rates["bandwidth"], rates["read"])
    floors = [max(b / memory, f / rates["flops"]) for b, f in work.phases]
    row: dict[str, Any] = {"name": work.name, "ours_us": time * 1e6, "phases": work.phases}
    row |= {"variant": asdict(kernels.variant), "roofline_share": max(floors) / time}
    if kernels.variant.shared:
        plain = Workload(work.name, work.spec, work.q_lens, work.kv_lens, ())
        row["plain_us"] = ours(timer, plain, batch, gate)[0] * 1e6
    row["peers"] = {name: peer(timer, name, work.spec, batch, expected) for name in PEERS}
    times = [found["us"] for found in row["peers"].values() if "us" in found]
    row["best_peer_us"] = min(times, default=None)
    return row


def peer(
    timer: Timer, name: str, spec: AttentionSpec, batch: Batch, expected: torch.Tensor
) -> dict[str, Any]:
    """A peer's time and its distance from our result, or why there is none."""
    try:
        if spec.kv != "native" or spec.window or spec.softcap or spec.sinks:
            raise Unsuitable("the peers are called for plain attention only")
        work = PEERS[name](spec, batch)
        error = float((work().reshape(expected.shape).float() - expected.float()).abs().max())
        time, how = timer.seconds(work)
        return {"us": time * 1e6, "how": how, "difference": error}
    except (ImportError, Unsuitable) as reason:
        return {"none": str(reason)}
    except Exception as error:  # noqa: BLE001 (a peer's failure is a finding)
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def sharing_rates(timer: Timer) -> Rates:
    """What `Gate` assumes besides `device_rates`, by batches made to show one each."""
    spec = AttentionSpec(32, 8, 128, 64)

    def time(batch: int, prefix: int, gate: Gate | None) -> float:
        groups = [SharedPrefix(0, prefix, range(batch))]
        work = Workload("gate", spec, [1] * batch, [prefix + 65] * batch, groups)
        inputs = random_batch(spec, work.q_lens, work.kv_lens, groups, device="cuda", poison=False)
        return ours(timer, work, inputs, gate)[0]

    never = Gate(launch=1.0)
    return {
        "reread": 64 * 8192 * spec.token_bytes / time(64, 8192, never),
        "attend_flops": 256 * 32768 * 4 * spec.heads * spec.head_dim / time(256, 32768, None),
        "launch": time(8, 64, None) - time(8, 64, never),
    }


def show(row: dict[str, Any]) -> str:
    """A line of the table."""
    best = row["best_peer_us"] or float("nan")
    found = {name: f"{peer['us']:.1f}" for name, peer in row["peers"].items() if "us" in peer}
    found |= {name: "failed" for name, peer in row["peers"].items() if "failed" in peer}
    one = row["ours_us"]
    plain = row.get("plain_us", one)
    times = f"{one:9.1f} {plain:9.1f} {best:9.1f}"
    peers = " ".join(f"{name}={value}" for name, value in found.items())
    share = f"{one / best:6.2f}x {row['roofline_share']:6.0%}"
    return f"{row['name']:<46} {times} {share}  {peers}"


COLUMNS = f"{'ours':>9} {'plain':>9} {'best peer':>9} {'ratio':>7} {'roof':>6}"
HEADER = f"{'us a layer':<46} {COLUMNS}"


def table(options: argparse.Namespace, path: Path) -> None:
    """Measure the rows that the file lacks, as long as there is time; write it after each."""
    begun = time.monotonic()
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    timer = Timer()
    if report.get("device") != torch.cuda.get_device_name():
        rates = device_rates(timer) | sharing_rates(timer)
        report = {"device": torch.cuda.get_device_name(), "rates": rates, "rows": []}
        report |= {"torch": torch.__version__, "triton": triton.__version__}
    print(f"{report['device']}: {report['rates']}\n{HEADER}")
    done = {row["name"] for row in report["rows"]}
    quick, works = options.quick, list[Workload]()
    for heads in options.heads:
        works += (*decode(heads, quick), *trees(heads), *extend(heads, quick), *prefill(heads))
    works = [work for work in works if work.name not in done]
    for number, work in enumerate(works):
        if time.monotonic() - begun > 60 * options.minutes:
            print(f"{len(works) - number} rows left: run the same command again")
            return
        try:
            report["rows"].append(measure(timer, work, "cuda", Gate(), report["rates"]))
        except torch.OutOfMemoryError as error:
            print(f"{work.name}: {error}")
            continue
        print(show(report["rows"][-1]), flush=True)
        path.write_text(json.dumps(report, indent=1))


def main() -> int:
    """Run what the command line asks for; the process's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny batches, no GPU, no numbers")
    parser.add_argument("--thorough", action="store_true", help="correctness of every shape")
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no row after this")
    parser.add_argument("--heads", choices=HEADS, nargs="*", default=[*HEADS])
    parser.add_argument("--json", type=Path, default=Path("attention.json"))
    options = parser.parse_args()
    if options.smoke:
        rates = {"bandwidth": 1.0, "read": 1.0, "flops": 1.0}
        lines = [show(measure(Timer(), work, "cpu", None, rates)) for work in smoke()]
        print(
            f"table: {len(lines)} rows (times of the interpreter mean nothing, so none are shown)"
        )
        return not check([*smoke()], "cpu") or any("failed" in line for line in lines)
    if not torch.cuda.is_available():
        parser.error("no CUDA device; --smoke runs without one")
    if not check([*correctness(options.thorough)], "cuda"):
        return 1
    table(options, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
