"""Compile what the attention benchmark launches, in parallel, on any machine.

    python benchmarks/gpu/prebuild.py --jobs 16          # fills TRITON_CACHE_DIR

GPU time is dear: with Triton's cache filled, on this machine or (same Triton) on another without a
GPU, the benchmark spends none of it compiling. The launches are the real ones, on small CPU
tensors, under a stand-in for the driver that says "sm_90"; nothing is launched.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import triton
from attrs import evolve, fields_dict, frozen
from peers import PEERS, Unsuitable
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from tune import VARIANTS
from workloads import Workload, correctness, decode, extend, prefill, trees

from sagellm_ir.runtime.accel import AttentionSpec, SharedPrefix
from sagellm_ir.runtime.accel.launch import (
    Lists,
    launch_attend,
    launch_merge,
    launch_schedule,
    rows_of_merge,
)
from sagellm_ir.runtime.accel.selfcheck import random_batch
from sagellm_ir.runtime.accel.tensors import Tensors
from sagellm_ir.runtime.accel.tiles import tile_for, tile_heights

SMS = 132
MAX_BATCH = 256


class _Driver:
    """Answers what `JITFunction.run` asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend() -> None:
    """Make launches of this process compile for a Hopper GPU, and do nothing else."""
    triton.runtime.driver.set_active(_Driver())
    real: Callable[..., Any] = JITFunction.run
    JITFunction.run = lambda self, *args, **kw: real(self, *args, **kw | {"warmup": True})
    properties: Any = SimpleNamespace(multi_processor_count=SMS, major=9, minor=0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


@frozen
class Job:
    """One thing to compile for: a kernel of ours with a tile, or a peer on a batch."""

    what: str
    spec: AttentionSpec
    rows: int = 16
    q_lens: tuple[int, ...] = (1,)
    kv_lens: tuple[int, ...] = (1,)


def jobs(thorough: bool, heads: list[str], variants: bool) -> Iterator[Job]:
    """What the benchmark runs, more than once where batches differ in lengths only."""
    timed: list[Workload] = []
    for name in heads:
        timed += (*decode(name, True), *trees(name), *extend(name, True), *prefill(name))
    for spec in dict.fromkeys(work.spec for work in (*timed, *correctness(thorough))):
        for rows in tile_heights(spec):
            yield from (Job(what, spec, rows) for what in ("shared", "private"))
        yield Job("rest", spec)
    for work in timed:
        if max(work.q_lens) == 1:
            yield Job("lmdeploy", work.spec, 0, *[(1,) * len(work.q_lens)] * 2)
        else:
            yield Job("lmdeploy", work.spec, 0, tuple(work.q_lens), tuple(work.kv_lens))
    for spec in dict.fromkeys(work.spec for work in timed if variants):
        yield from (Job("variant", spec, number) for number in range(len(VARIANTS)))


def compile_one(job: Job) -> str:
    """Compile a job's kernels; what went wrong, or nothing."""
    try:
        if job.what in PEERS:
            groups = [SharedPrefix(0, min(job.kv_lens) // 64 * 64, range(len(job.kv_lens)))]
            shared = groups if len(job.kv_lens) > 1 and groups[0].stop else []
            batch = random_batch(job.spec, job.q_lens, job.kv_lens, shared, poison=False)
            PEERS[job.what](job.spec, batch)()
        else:
            _ours(job.what, job.spec, job.rows)
    except (ImportError, Unsuitable):
        pass  # The benchmark says so too.
    except Exception as error:  # noqa: BLE001 (reported, and the rest goes on)
        return f"{job}: {type(error).__name__}: {error}"
    return ""


def _ours(what: str, spec: AttentionSpec, rows: int) -> None:
    batch = random_batch(spec, [1], [1], poison=False)
    ints = torch.zeros(64, dtype=torch.int32)
    floats = torch.zeros(64)
    whole = [floats if name in ("partial", "lse") else ints for name in fields_dict(Lists)]
    lists = Lists(*whole)
    extra = batch.extra
    x = Tensors(
        *(batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.lengths),
        torch.empty_like(batch.q),
        *(extra.get("k_scales"), extra.get("v_scales"), extra.get("sinks"), 0.5, 0.5),
    )
    if what == "variant":
        shared, tile = VARIANTS[rows]
        launch_attend(spec, tile, SMS, x, lists, ints, ints, shared=shared, early=True)
        return
    tile = tile_for(spec, rows)
    if what != "rest":
        forms = [(False, False)]
        if what == "private":
            forms += [(True, False), (True, True)]
        for beside, late in forms:
            launch_attend(
                *(spec, tile, SMS, x, lists, ints, ints),
                shared=what == "shared",
                early=True,
                beside=beside,
                late=late,
            )
        return
    for rows, shared in product(rows_of_merge(spec), (False, True)):
        many = evolve(x, q=x.q.expand(rows, -1, -1))
        launch_merge(spec, many, lists, shared=shared, early=True)
    for height in tile_heights(spec):
        launch_schedule(
            *(spec, tile_for(spec, height), batch.lengths, lists, ints, ints),
            max_batch=MAX_BATCH,
            batch=1,
        )


def main() -> int:
    """Compile everything; the number of failures is the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--thorough", action="store_true")
    parser.add_argument("--variants", action="store_true", help="for tune.py too")
    parser.add_argument(
        "--heads", nargs="*", default=["llama-3-8b", "qwen2.5-7b", "70b-tp8", "mha"]
    )
    options = parser.parse_args()
    begun = time.monotonic()
    todo = list(dict.fromkeys(jobs(options.thorough, options.heads, options.variants)))
    with ProcessPoolExecutor(options.jobs, initializer=pretend) as pool:
        problems = [problem for problem in pool.map(compile_one, todo) if problem]
    print("\n".join(problems))
    print(f"prebuilt {len(todo)} jobs, {len(problems)} failed, {time.monotonic() - begun:.0f} s")
    return len(problems)


if __name__ == "__main__":
    sys.exit(main())
