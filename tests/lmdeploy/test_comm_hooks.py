"""Patch 0004: one way for all collectives, which can be counted, replaced and fused."""

import contextlib
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lmdeploy.pytorch import comm
from lmdeploy.pytorch.backends.cuda.graph_runner import CUDASingleGraphRunner

from sagellm_ir.runtime.engines.lmdeploy.collectives import CollectiveCounter
from tests.lmdeploy.trees import PATCHED, on_patched


def test_without_a_handler_the_functions_are_those_of_torch() -> None:
    for name in comm.COLLECTIVES:
        assert getattr(comm, name) is getattr(dist, name)
    assert comm.ReduceOp is dist.ReduceOp
    with pytest.raises(AttributeError):
        comm.no_such_function  # noqa: B018


def test_no_module_calls_a_collective_of_torch_directly() -> None:
    called = re.compile(r"\b(torch\.distributed|dist)\.(" + "|".join(comm.COLLECTIVES) + r")\(")
    stray = re.compile(
        r"^(import torch\.distributed as dist|from torch import distributed)", re.MULTILINE
    )
    direct = []
    for path in (PATCHED / "lmdeploy" / "pytorch").rglob("*.py"):
        text = path.read_text()
        uses = {match.group(1) for match in called.finditer(text)}
        if path.name != "comm.py" and (
            "torch.distributed" in uses or (uses and stray.search(text))
        ):
            direct.append((path.name, sorted(uses)))
    assert direct == []


def test_two_ranks_count_every_collective_and_can_fuse_one(tmp_path: Path) -> None:
    command = ("tests.lmdeploy.two_ranks", str(tmp_path / "meeting"))
    ranks = [on_patched(command[0], str(rank), command[1]) for rank in range(2)]
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    for rank, (out, err) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, err
        seen = json.loads(out.splitlines()[-1])
        assert all(seen["right"]), seen["right"]
        assert seen["timed"]
        assert seen["counts"] == {
            "all_reduce": [2, 3 * 4 * 4 + 5 * 4],  # a row-parallel linear, and the wrapper
            "broadcast": [2, 2 * 4 + 8],  # the wrapper, and the sampled tokens
            "all_gather": [2, 4 + 2 * 3 * 4],  # the wrapper, and the gather by sizes
            "all_gather_into_tensor": [1, 2 * 4],
        }


class Model:
    """What a graph runner needs of a model; its forward is two all-reduces."""

    ctx_mgr = types.SimpleNamespace(current_context=lambda: None)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        for _ in range(2):
            comm.all_reduce(torch.ones(6))
        return {}

    def make_buffers_cudagraph(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}

    fill_buffers_cudagraph = update_context_cudagraph = make_buffers_cudagraph
    make_output_buffers = get_outputs_cudagraph = make_buffers_cudagraph


def test_graph_replays_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = types.SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    runner = CUDASingleGraphRunner.__new__(CUDASingleGraphRunner)
    parts = {
        "model": Model(),
        "ctx_mgr": Model.ctx_mgr,
        "meta": types.SimpleNamespace(),
        "pool": None,
    }
    vars(runner).update(parts)
    counter = CollectiveCounter(inner=lambda name, call, args, kwargs: None)
    counter.start()
    try:
        runner.capture()
        assert (counter.counts()["all_reduce"].calls, counter.counts()["all_reduce"].replayed) == (
            2,
            0,
        )
        for _ in range(5):
            runner.forward()
    finally:
        counter.stop()
    runner.forward()  # no longer counted
    count = counter.counts()["all_reduce"]
    assert (count.calls, count.replayed, count.bytes) == (12, 10, 12 * 24)
