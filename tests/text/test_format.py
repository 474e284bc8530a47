"""The text format itself: what version 1 looks like, and what is left out of a dump."""

from pathlib import Path

from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.nodes import Decode, Location, Origin, Prefill
from sagellm_ir.serial import graph_from_json, graph_to_json
from sagellm_ir.target import Device, Target
from sagellm_ir.text import parse_graph, print_graph

VERSION_1 = Path(__file__).parent / "version_1.ir"


def test_version_1_reads_and_prints_as_ever() -> None:
    """A text of version 1 as first released: a change that breaks it needs a new version."""
    text = VERSION_1.read_text(encoding="utf-8")
    assert print_graph(parse_graph(text)) == text


def test_defaults_are_left_out() -> None:
    assert print_graph(IRGraph()) == "sagellm_ir 1\n\ngraph @main {stage = built} {\n}\n"


def test_floats_come_back_exactly() -> None:
    device = Device(flops=0.1 + 0.2, bandwidth=5e-324, allreduce_bandwidth=float("inf"))
    graph = IRGraph(target=Target(device=device))
    assert parse_graph(print_graph(graph)).target.device == device


def test_odd_names_are_quoted() -> None:
    odd = 'a "b"\n\u2028 // %x\ud800'
    request = RequestDecl(odd, prompt_len=4, max_new_tokens=1, tenant="none", session="1x")
    prefill = Prefill(odd, odd, 0, 4, worker="true")
    graph = IRGraph(odd, requests=(request,), nodes=(prefill,))
    text = print_graph(graph)
    text.encode("ascii")
    assert parse_graph(text) == graph
    assert graph_from_json(graph_to_json(graph)) == graph


def test_provenance_is_a_comment() -> None:
    node = Prefill(
        "p", "r", 0, 4, loc=Location("a\nb.ir", 3, 1), origin=Origin("dedup", ("x", "y"))
    )
    graph = IRGraph(nodes=(node,))
    text = print_graph(graph, provenance=True)
    assert "%p = prefill @r[0:4] : kv<4>  // loc: a b.ir:3:1 origin: dedup(x, y)\n" in text
    assert parse_graph(text) == graph


def test_locations_of_parsed_nodes() -> None:
    text = "sagellm_ir 1\ngraph @g {\n  request @r {prompt = 4}\n   %p = prefill @r[0:4]\n}"
    graph = parse_graph(text, "x.ir")
    assert graph.nodes[0].loc == Location("x.ir", 4, 4)
    assert graph.requests[0].loc == Location("x.ir", 3, 3)


def test_schedule_attributes_come_last() -> None:
    node = Decode("d", "r", 4, 6, operands=("p",), step=3, until=4, worker="w0")
    text = print_graph(IRGraph(nodes=(node,), loops=(1, 1, 1, 16)))
    assert "%d = decode @r[4:6](%p) {step = 3, until = 4, worker = w0} : kv<6>" in text
    assert "steps [1x3, 16x1]" in text
