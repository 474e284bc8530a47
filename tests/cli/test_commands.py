"""What the commands print when all goes well."""

import json
from pathlib import Path

import jsonschema
import pytest

from sagellm_ir.passes.registry import pass_names
from sagellm_ir.text import parse_graph
from tests.cli.conftest import Cli

TOKENS = "examples/tokens.jsonl"
CHAT = "examples/chat_shared_document.jsonl"


@pytest.mark.parametrize("stage", ["built", "optimised", "scheduled"])
def test_dumps_parse_back(stage: str, cli: Cli) -> None:
    ran = cli("ir", "dump", "-r", TOKENS, "--stage", stage)
    assert ran.code == 0
    graph = parse_graph(ran.out)
    assert graph.stage in {"built": ("built",), "scheduled": ("scheduled",)}.get(
        stage, ("built", "placed")
    )
    assert len(graph.requests) == 4


def test_dump_reads_standard_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": [1, 2, 3], "max_tokens": 4}\n'))
    ran = cli("ir", "dump", "-r", "-", "--stage", "built")
    assert "decode @r0[3:7]" in ran.out


def test_dump_shares_the_document_of_a_chat(cli: Cli) -> None:
    ran = cli("ir", "dump", "-r", CHAT, "--tokenizer", "bytes", "-O2")
    assert ran.code == 0
    shared = [line for line in ran.out.splitlines() if ".s0 = prefill" in line]
    assert len(shared) >= 1


def test_provenance(cli: Cli) -> None:
    ran = cli("ir", "dump", "-r", CHAT, "--tokenizer", "bytes", "--provenance")
    assert f"loc: {CHAT}:1:1" in ran.out
    assert "origin: prefix-dedup" in ran.out


@pytest.mark.parametrize(("form", "start"), [("dot", "digraph"), ("mermaid", "flowchart LR")])
def test_pictures(form: str, start: str, cli: Cli) -> None:
    ran = cli("ir", "dump", "-r", TOKENS, "-f", form)
    assert ran.out.startswith(start)
    assert ran.out.count("->") + ran.out.count("-->") >= 4


def test_dump_as_json_and_plans(cli: Cli) -> None:
    assert json.loads(cli("ir", "dump", "-r", TOKENS, "-f", "json").out)
    assert cli("ir", "dump", "-r", TOKENS, "--stage", "plan").out.startswith("step")
    assert cli("ir", "dump", "-r", TOKENS, "--stage", "plan", "-f", "mermaid").out.startswith(
        "gantt"
    )
    picture = cli("ir", "dump", "-r", TOKENS, "--stage", "plan", "-f", "dot").out
    assert picture.startswith("digraph")
    assert "prefill t0[" in picture
    plan = json.loads(cli("ir", "dump", "-r", TOKENS, "--stage", "plan", "-f", "json").out)
    schema = json.loads(cli("schema", "dump", "ExecutionPlan").out)
    jsonschema.validate(plan, schema)


def test_passes_are_listed_with_their_laws(cli: Cli) -> None:
    listed = json.loads(cli("ir", "passes", "--json").out)
    assert [item["name"] for item in listed["passes"]] == pass_names()
    shown = cli("ir", "passes", "--show").out
    for item in listed["passes"]:
        assert item["summary"] in shown
        for option in item["options"]:
            assert f"option {option}:" in shown
    for preset in ("O0", "O1", "O2", "O3"):
        assert preset in shown


def test_passes_tell_what_they_did(cli: Cli) -> None:
    words = ("ir", "passes", "-r", CHAT, "--tokenizer", "bytes")
    rows = {row["pass"]: row for row in json.loads(cli(*words, "--json", "--diff").out)}
    assert rows["prefix-dedup"]["changed"]
    assert "+  %" in rows["prefix-dedup"]["diff"]
    shown = cli(*words, "--diff")
    assert "+  %" in shown.out
    assert "prefix-dedup" in shown.out


def test_opt_verify_and_diff(cli: Cli, tmp_path: Path) -> None:
    before, after, dumps = tmp_path / "a.ir", tmp_path / "b.ir", tmp_path / "dumps"
    words = ("ir", "dump", "-r", CHAT, "--tokenizer", "bytes", "--stage", "built")
    assert cli(*words, "-o", str(before)).out == ""
    ran = cli("ir", "opt", "-p", "prefix-dedup", str(before), "-o", str(after), "--timing",
              "--stats", "--print-diff", "--dump-dir", str(dumps))  # fmt: skip
    assert ran.code == 0
    assert ran.out == ""
    assert "Statistics of passes" in ran.err
    assert sorted(path.name for path in dumps.iterdir()) == [
        "00_input.ir", "01_prefix-dedup.ir", "index.md"]  # fmt: skip
    assert cli("ir", "verify", str(after)).code == 0
    assert cli("ir", "diff", str(before), str(before), "--exit-code").code == 0
    different = cli("ir", "diff", str(before), str(after), "--exit-code")
    assert different.code == 1
    assert "prefill +" in different.err
    assert different.out.startswith(f"--- {before}\n+++ {after}\n")


def test_graphs_for_programs(cli: Cli, tmp_path: Path) -> None:
    before, after = tmp_path / "a.ir", tmp_path / "b.ir"
    cli("ir", "dump", "-r", CHAT, "--tokenizer", "bytes", "--stage", "built", "-o", str(before))
    made = cli("ir", "opt", "-p", "prefix-dedup", str(before), "--json")
    nodes = json.loads(made.out)["graph"]["nodes"]
    cli("ir", "opt", "-p", "prefix-dedup", str(before), "-o", str(after))
    checked = json.loads(cli("ir", "verify", str(after), "--json").out)
    assert checked == {"valid": True, "stage": "built", "nodes": len(nodes)}
    same = json.loads(cli("ir", "diff", str(before), str(before), "--json").out)
    assert same == {"equal": True, "nodes": {}, "diff": ""}
    found = cli("ir", "diff", str(before), str(after), "--json", "--exit-code")
    assert found.code == 1
    different = json.loads(found.out)
    assert not different["equal"]
    assert different["nodes"]["prefill"] > 0
    assert different["diff"].startswith("---")


def test_no_rewrites_allowed(cli: Cli, tmp_path: Path) -> None:
    before = tmp_path / "a.ir"
    cli("ir", "dump", "-r", CHAT, "--tokenizer", "bytes", "--stage", "built", "-o", str(before))
    kept = cli("ir", "opt", "-p", "prefix-dedup", "--max-rewrites", "0", str(before))
    assert parse_graph(kept.out) == parse_graph(before.read_text())


def test_a_reproducer_runs_again(cli: Cli, tmp_path: Path) -> None:
    graph = cli("ir", "dump", "-r", TOKENS, "--stage", "built").out
    repro = tmp_path / "repro.ir"
    repro.write_text(f"// RUN: --pipeline canonicalize\n{graph}")
    assert parse_graph(cli("ir", "repro", str(repro)).out).requests
    assert json.loads(cli("ir", "repro", str(repro), "--json").out)["graph"]["requests"]
    assert cli("ir", "repro", str(repro), "--bisect").out.strip() == "it does not fail"
    bisected = cli("ir", "repro", str(repro), "--bisect", "--json")
    assert json.loads(bisected.out) == {"fails_from_rewrite": None}


def test_plan_files_run_on_the_simulator(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    shown = cli("plan", "-r", TOKENS, "-o", str(path))
    assert shown.out.startswith("step")
    assert "█" in shown.out
    ran = cli("run", "--plan", str(path), "--backend", "simulator", "--json")
    requests = json.loads(ran.out)["requests"]
    assert [request["generated"] for request in requests] == [8, 12, 16, 8]
    shown = cli("run", "--plan", str(path), "--backend", "simulator")
    assert "first token s" in shown.out
    assert "ttft p99" in shown.err


def test_a_graph_compiles_to_a_plan(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "g.ir"
    cli("ir", "dump", "-r", TOKENS, "--stage", "built", "-o", str(path))
    assert cli("plan", "--ir", str(path)).out.startswith("step")
    assert json.loads(cli("plan", "--ir", str(path), "--json").out)["steps"]


def test_run_prints_answers_of_the_real_model(cli: Cli) -> None:
    ran = cli("run", "--prompt", "What is the capital of France?", "--max-new", "16")
    assert ran.code == 0
    assert ran.out.strip() == "The capital of France is Paris."
    assert "time to first token" in ran.err


def test_explain(cli: Cli) -> None:
    words = ("explain", "age", "-r", CHAT, "--tokenizer", "bytes")
    ran = cli(*words)
    assert "shared; made for request hours" in ran.out
    assert "decoded in steps" in ran.out
    found = json.loads(cli(*words, "--json").out)
    assert {span["how"] for span in found["spans"]} == {"shared", "computed"}


def test_explain_says_why_a_request_waited_and_what_was_evicted(cli: Cli) -> None:
    words = ("explain", "t3", "-r", TOKENS, "--set", "max_batch=1")
    assert "waited" in cli(*words).out


def test_backends(cli: Cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("backend", "list", "--json").out)}
    assert rows["embedded"]["ready"]
    assert rows["simulator"]["ready"]
    assert "embedded" in cli("backend", "list").out
    tested = json.loads(cli("backend", "test", "embedded", "--json").out)
    assert len(tested) >= 14
    assert all(row["equal"] for row in tested)
    assert any(row["moved_blocks"] for row in tested)
