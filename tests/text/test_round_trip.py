"""Every valid graph survives text and JSON, and text printed twice is the same."""

from hypothesis import given

from sagellm_ir.graph import IRGraph
from sagellm_ir.serial import graph_from_json, graph_to_json
from sagellm_ir.text import parse_graph, print_graph
from sagellm_ir.verify import check_capacity, verify
from tests.strategies import graphs


@given(graphs())
def test_drawn_graphs_are_valid(graph: IRGraph) -> None:
    verify(graph)
    if graph.stage == "scheduled":
        check_capacity(graph)


@given(graphs())
def test_text_round_trip(graph: IRGraph) -> None:
    text = print_graph(graph)
    parsed = parse_graph(text)
    assert parsed == graph
    assert print_graph(parsed) == text
    assert parse_graph(print_graph(parsed, provenance=True)) == graph


@given(graphs())
def test_json_round_trip(graph: IRGraph) -> None:
    text = graph_to_json(graph)
    assert graph_from_json(text) == graph
    assert graph_to_json(graph_from_json(text)) == text
