"""The example request sets load without a warning and share what they say they share."""

from itertools import pairwise
from pathlib import Path

import pytest

from sagellm_ir.build import Built, ByteTokenizer, build
from sagellm_ir.presets import load_target
from sagellm_ir.requests import load_requests
from sagellm_ir.text import parse_graph, print_graph
from sagellm_ir.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = [
    "agent_session.jsonl",
    "batch_api.jsonl",
    "chat_shared_document.jsonl",
    "mixed_priority.jsonl",
    "tokens.jsonl",
    "trace_sample.jsonl",
]


def built(name: str) -> Built:
    loaded = load_requests([EXAMPLES / name])
    assert loaded.warnings == ()
    target = load_target("cpu")
    return build(loaded.requests, target, tokenizer=ByteTokenizer(), locations=loaded.locations)


def test_every_example_is_listed_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.jsonl")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_example_builds_a_legal_graph(name: str) -> None:
    graph = built(name).graph
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.parametrize("name", NAMES)
def test_example_shares_prefixes(name: str) -> None:
    blocks = [block for request in built(name).graph.requests for block in request.blocks]
    assert len(set(blocks)) < len(blocks)


def test_the_shared_document_is_the_longest_part() -> None:
    first, *others = (
        request.blocks for request in built("chat_shared_document.jsonl").graph.requests
    )
    for other in others:
        assert len(set(first) & set(other)) > 400


def test_an_agent_turn_repeats_the_history() -> None:
    turns = [request.blocks for request in built("agent_session.jsonl").graph.requests]
    for earlier, later in pairwise(turns):
        assert later[: len(earlier) - 1] == earlier[:-1]


def test_tenants_do_not_share() -> None:
    graph = built("mixed_priority.jsonl").graph
    by_tenant: dict[str | None, set[int]] = {}
    for request in graph.requests:
        by_tenant.setdefault(request.tenant, set()).update(request.blocks)
    assert not by_tenant["seaview"] & by_tenant["hillcrest"]
