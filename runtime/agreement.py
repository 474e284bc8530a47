"""`agreement`: one plan on every engine there is, each in a process of its own; what each answered and ran."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import asdict, evolve, frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.lowering.compiler import compile_requests
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.lowering.serial import save_plan
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.engines import BACKENDS, BackendKind
from sagellm_ir.runtime.selftest import tight_requests
from sagellm_ir.runtime.trace import Trace, chunks, differences, load_trace

__all__ = ["Agreement", "absent", "agreement", "make_plan"]

REFERENCE = "embedded"
"""The engine that others are compared with; `self_test` compares it with plain greedy decoding."""
PLANNED = ("simulator", "embedded", "vllm", "lmdeploy")
"""Kinds that `run` can run, and that keep a trace."""
UNMIXED = ("lmdeploy",)
"""Kinds whose forwards are all prefill or all decode."""
HALF = {"lmdeploy": "float16"}
"""Kinds that have no float32, and what they compute in."""
WORDLESS = ("simulator",)
"""Kinds whose tokens are made up."""
SHAPE = {
    "block_size": 32,  # vLLM on a CPU takes multiples of 32
    "max_tokens": 192,
    "max_batch": 3,
    "device": {"step_overhead": 1e-9},  # so that sharing pays for a model this small
    "tiers": {"device": {"blocks": 16}, "host": {"blocks": 64}},
}
FULL = "float32"
FIRST_TOKEN = 1000
"""Special tokens lie below it, in the models that are known here."""


@frozen
class Agreement:
    """How one engine ran the plan, beside the reference."""

    engine: str
    forwards: int
    chunks: int
    """Prefill chunks."""
    moved_blocks: int
    tokens: bool | None
    """Whether all answers are the reference's; None: the engine makes up its tokens, or computes in a
    type in which near ties may fall differently."""
    equal_answers: int
    """Answers that are the reference's, in the type that the engine computes in."""
    answers: int
    dtype: str
    differences: tuple[str, ...]
    """In chunks, their order, or the blocks they share; or why the engine did not run."""

    @property
    def agrees(self) -> bool:
        """Nothing differs that must not."""
        return self.tokens is not False and not self.differences


def agreement(
    model: str, *, pythons: Mapping[str, str] | None = None, seed: int | None = None
) -> Iterator[Agreement]:
    """Runs one plan of random requests that share prefixes and press on the pool.

    Args:
        model: what the engines load; see `load_model`.
        pythons: interpreters of engines that are not installed in this one, by engine.
        seed: of the requests; None takes a fresh one.

    Yields:
        The reference first, then each other engine that is there.

    Raises:
        SageIRError: no such engine or model, or the reference did not run.
    """
    found = _interpreters(pythons or {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mixed = not any(kind in found for kind in UNMIXED)
        plan = make_plan(model, seed, mixed=mixed)
        save_plan(plan, folder / f"{FULL}.json")
        half = evolve(plan.target, model=evolve(plan.target.model, dtype_bytes=2))
        for dtype in HALF.values():  # the same steps: only the size of a number is another
            save_plan(evolve(plan, target=half), folder / f"{dtype}.json")
        here = found.pop(REFERENCE)
        references = {FULL: _run(REFERENCE, here, model, folder, FULL)}
        yield _compare(REFERENCE, references[FULL], references[FULL])
        for kind, python in found.items():
            dtype = HALF.get(kind, FULL)
            if dtype not in references:
                references[dtype] = _run(REFERENCE, here, model, folder, dtype)
            yield _beside(references[dtype], kind, python, model, folder)


def absent(pythons: Mapping[str, str]) -> dict[str, str]:
    """Engines that `agreement` leaves out, and why."""
    return {
        kind.name: why
        for kind in BACKENDS
        if kind.name not in pythons and (why := _why_absent(kind))
    }


def _why_absent(kind: BackendKind) -> str:
    """Why an engine cannot run in this interpreter; empty: it can."""
    if kind.missing:
        return f"{kind.install}, or --python {kind.name}=PATH"
    if kind.name == "lmdeploy":
        import torch

        if not torch.cuda.is_available():
            return "it needs a CUDA device, and there is none"
    return ""


def make_plan(model: str, seed: int | None = None, *, mixed: bool = True) -> ExecutionPlan:
    """An O2 plan of twelve random requests, which every engine can run.

    Args:
        model: see `agreement`.
        seed: see `agreement`.
        mixed: whether a forward may hold prefills and decodes.

    Raises:
        SageIRError: there is no such model.
    """
    from sagellm_ir.runtime.engines.embedded.load import open_model

    spec = open_model(model)[0].spec(dtype_bytes=4)
    target = load_target("vllm-cpu", **{**SHAPE, "mixed": mixed, "model": asdict(spec)})
    if spec.vocab <= FIRST_TOKEN:
        raise SageIRError(Diagnostic(f"model {model!r} has only {spec.vocab} tokens"))
    requests = tight_requests(random.Random(seed), target, range(FIRST_TOKEN, spec.vocab))
    return compile_requests(requests, target, "O2").plan


@frozen
class _Run:
    dtype: str
    tokens: dict[str, list[int]]
    trace: Trace


def _interpreters(pythons: Mapping[str, str]) -> dict[str, str]:
    """The interpreter of each engine that is there."""
    for kind, python in pythons.items():
        if kind not in PLANNED:
            raise SageIRError(Diagnostic(f"no engine {kind!r}", help=suggest(kind, PLANNED)))
        if shutil.which(python) is None:
            raise SageIRError(Diagnostic(f"no interpreter {python!r} for engine {kind!r}"))
    here: dict[str, BackendKind] = {kind.name: kind for kind in BACKENDS if kind.name in PLANNED}
    found = {name: sys.executable for name, kind in here.items() if not _why_absent(kind)}
    found |= pythons
    if REFERENCE not in found:
        here[REFERENCE].require()
    return found


def _run(kind: str, python: str, model: str, folder: Path, dtype: str) -> _Run:
    """The plan on one engine, by the command that a user would give.

    Raises:
        SageIRError: it failed; with the last it said.
    """
    answers, trace = folder / f"{kind}.answers", folder / f"{kind}.trace"
    words: tuple[str | Path, ...]
    words = (
        "--plan",
        folder / f"{dtype}.json",
        "--backend",
        kind,
        "--model",
        model,
        "--ignore-eos",
    )
    words += ("--dtype", dtype, "--trace", trace, "-o", answers)
    command = (python, "-m", "sagellm_ir", "run", *words)
    # Triton rounds float32 to fewer bits in products, unless it is told not to.
    exact = os.environ | ({"TRITON_F32_DEFAULT": "ieee"} if dtype == FULL else {})
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=exact)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise SageIRError(Diagnostic(f"{kind} ended with {done.returncode}: {' '.join(said[-3:])}"))
    data = json.loads(answers.read_text())
    return _Run(
        dtype,
        {answer["request"]: answer["tokens"] for answer in data.get("answers", ())},
        load_trace(trace),
    )


def _beside(reference: _Run, kind: str, python: str, model: str, folder: Path) -> Agreement:
    """One more engine; one that does not run disagrees."""
    try:
        return _compare(kind, _run(kind, python, model, folder, reference.dtype), reference)
    except SageIRError as error:
        return Agreement(kind, 0, 0, 0, None, 0, 0, reference.dtype, (str(error),))


def _compare(kind: str, run: _Run, reference: _Run) -> Agreement:
    equal = sum(run.tokens.get(name) == answer for name, answer in reference.tokens.items())
    judged = kind not in WORDLESS and run.dtype == FULL
    return Agreement(
        kind,
        len(run.trace.forwards),
        len(chunks(run.trace)),
        sum(len(move.src) for forward in run.trace.forwards for move in forward.moves),
        run.tokens == reference.tokens if judged else None,
        0 if kind in WORDLESS else equal,
        0 if kind in WORDLESS else len(reference.tokens),
        run.dtype,
        tuple(differences(reference.trace, run.trace)),
    )
