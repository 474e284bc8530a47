"""With no hook set, the patched engine decides as the stock one does."""

import json
from typing import Any

import pytest

from tests.lmdeploy import cpu, recordings, trees


def plain(value: Any) -> Any:
    """As JSON would give it back."""
    return json.loads(json.dumps(value, default=int))


@pytest.mark.parametrize("name", recordings.ENGINE)
def test_engine_runs_the_same_forwards(name: str, stock: Any) -> None:
    assert plain(recordings.ENGINE[name]()) == stock["engine"][name]


def test_scheduler_runs_the_same_sequences_in_the_same_blocks(stock: Any) -> None:
    traces = [recordings.scheduler_trace(s, prefix) for s in range(4) for prefix in (True, False)]
    assert plain(traces) == stock["scheduler"]
    assert sum(len(step) > 0 for trace in traces for step in trace if isinstance(step, list)) > 200


def test_recordings_cover_sharing_preemption_and_further_turns(stock: Any) -> None:
    forwards = {name: trace for name, (_, trace) in stock["engine"].items()}
    assert any(max(step["history"]) > 0 for step in forwards["late"] if not step["decode"])
    recomputed = [step for step in forwards["small_pool"] if not step["decode"]][2:]
    assert any(length > 60 for step in recomputed for length in step["tokens"])
    assert any(step["history"][0] > 0 for step in forwards["turns"] if not step["decode"])


def test_trees_differ() -> None:
    assert trees.PATCHED != trees.STOCK
    assert cpu.scheduler().plan_source is None
