"""JSON of graphs: what is refused, and what the message says. Round trips: tests/text."""

import json
from typing import Any

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.nodes import Prefill
from sagellm_ir.serial import graph_from_json, graph_to_json

GRAPH = IRGraph(
    requests=(RequestDecl("r", prompt_len=4),), nodes=(Prefill("p", "r", 0, 4, worker="w0"),)
)


def document() -> Any:
    return json.loads(graph_to_json(GRAPH))


def refused(text: str) -> str:
    with pytest.raises(SageIRError) as caught:
        graph_from_json(text, "g.json")
    return str(caught.value)


def test_truncated() -> None:
    assert "g.json:1:41: error: the JSON ends too early: is it truncated?" in refused(
        graph_to_json(GRAPH)[:40]
    )


def test_deep_nesting_is_refused() -> None:
    assert "not JSON that can be read" in refused("[" * 100_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object with the keys 'sagellm_ir' and 'graph'"),
        ('{"sagellm_ir": 9, "graph": {}}', "version 9 of the JSON cannot be read"),
        ('{"sagellm_ir": 1, "graph": 5}', "expected an object under the key 'graph'"),
        ('{"sagellm_ir": 1, "graph": {"nodes": 5}}', "expected a list, found 5 @ graph.nodes"),
        ('{"sagellm_ir": 1, "graph": {"loops": [true]}}', "expected int, found 'True'"),
        ('{"sagellm_ir": 1, "graph": {"x": 1}}', "extra fields found (x) @ graph"),
    ],
)
def test_wrong_documents(text: str, message: str) -> None:
    assert message in refused(text)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "prefil", "found 'prefil'; did you mean 'prefill'? @ graph.nodes[0]"),
        ("stop", "4", "expected int, found '4' @ graph.nodes[0].stop"),
        ("operands", "ab", "expected a list, found ab @ graph.nodes[0].operands"),
        ("strt", 0, "extra fields found (strt) @ graph.nodes[0]"),
    ],
)
def test_wrong_nodes(key: str, value: object, message: str) -> None:
    wrong = document()
    wrong["graph"]["nodes"][0][key] = value
    assert message in refused(json.dumps(wrong))
