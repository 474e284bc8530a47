"""The pass manager, its instruments, reproducers and bisection."""

import gc
import io
from pathlib import Path
from weakref import ref

import pytest
from rich.console import Console

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.nodes import Decode, Prefill
from sagellm_ir.passes.base import Pass
from sagellm_ir.passes.bisect import bisect
from sagellm_ir.passes.instruments import (
    Diff,
    Dump,
    Instrument,
    PassRun,
    Reproducer,
    Statistics,
    Timing,
    read_reproducer,
)
from sagellm_ir.passes.manager import PassError, PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.text import parse_graph, print_graph
from sagellm_ir.verify import VerifyError
from tests.passes.broken import Crash, DropDecodes, LieAboutStage, Nothing, Refuse, Rename


@pytest.fixture
def graph() -> IRGraph:
    """Two prompts that share two blocks."""
    requests = tuple(
        RequestDecl(f"r{i}", prompt_len=40 + i, blocks=(0, 1), max_new_tokens=4) for i in range(2)
    )
    nodes = [Prefill(f"p{i}", f"r{i}", 0, 40 + i) for i in range(2)]
    decodes = [Decode(f"d{i}", f"r{i}", 40 + i, 44 + i, operands=(f"p{i}",)) for i in range(2)]
    return IRGraph("g", requests=requests, nodes=(*nodes, *decodes))


def pipeline(*passes: Pass) -> Pipeline:
    return Pipeline(passes)


def test_an_empty_pipeline_verifies(graph: IRGraph) -> None:
    assert PassManager(Pipeline()).run(graph) is graph
    with pytest.raises(VerifyError):
        PassManager(Pipeline()).run(graph.replace(nodes=graph.nodes[1:]))


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        (Crash(), "IndexError: out of luck"),
        (DropDecodes(), "request @r0 has no decode"),
        (LieAboutStage(), "says its result is placed, but it is built"),
    ],
)
def test_a_bug_of_a_pass_is_told_from_bad_input(graph: IRGraph, broken: Pass, cause: str) -> None:
    with pytest.raises(PassError) as caught:
        PassManager(pipeline(Nothing(), broken)).run(graph)
    found = caught.value.diagnostics[0]
    assert f"pass {broken.name!r} (number 2 of the pipeline) failed" in found.message
    assert cause in found.notes[0]


def test_a_target_that_cannot_is_no_bug(graph: IRGraph) -> None:
    with pytest.raises(SageIRError, match="too small") as caught:
        PassManager(pipeline(Refuse())).run(graph)
    assert not isinstance(caught.value, PassError)


def test_a_pass_at_the_wrong_stage_is_found_before_anything_runs(graph: IRGraph) -> None:
    timing = Timing()
    with pytest.raises(SageIRError) as caught:
        PassManager(Pipeline.parse("canonicalize,evict"), (timing,)).run(graph)
    found = caught.value.diagnostics[0]
    assert "pass 'evict' (number 2 of the pipeline) needs a scheduled graph" in found.message
    assert found.help == "add 'schedule' before it"
    assert not timing.rows


def test_a_pass_too_late_is_told_where_to_go(graph: IRGraph) -> None:
    with pytest.raises(SageIRError, match="move it before 'schedule'"):
        PassManager(Pipeline.parse("schedule,prefix-dedup")).run(graph)
    with pytest.raises(SageIRError, match="start from a built graph"):
        PassManager(Pipeline.parse("kv-reuse")).run(graph.replace(stage="scheduled"))


def test_timing_and_statistics(graph: IRGraph) -> None:
    timing, statistics = Timing(), Statistics()
    PassManager(Pipeline.parse("kv-reuse,prefix-dedup"), (timing, statistics)).run(graph)
    assert [(row.spec, row.changed) for row in timing.rows] == [
        ("kv-reuse", False),
        ("prefix-dedup", True),
    ]
    assert all(row.seconds >= 0 and row.nodes == 4 for row in timing.rows)
    assert statistics.rows[0].counts == {}
    assert statistics.rows[1].ops == {"prefill": 1}
    assert statistics.rows[1].counts["tokens saved"] == 32
    for instrument in (timing, statistics):
        console = Console(record=True, width=120, file=io.StringIO())
        console.print(instrument.table())
        assert "prefix-dedup" in console.export_text()


def test_diff_shows_what_changed(graph: IRGraph) -> None:
    seen: list[str] = []
    PassManager(Pipeline.parse("canonicalize,prefix-dedup"), (Diff(seen.append),)).run(graph)
    assert "+  %p1 = prefill @r1[32:41](%p0.s0) : kv<41>\n" in seen[1]
    assert "-  %p1 = prefill @r1[0:41] : kv<41>\n" in seen[1]


def test_dumps_can_be_run_again(graph: IRGraph, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"
    text = "kv-reuse,prefix-dedup{gated=false},chunk-prefill{tokens=16}"
    result = PassManager(Pipeline.parse(text), (Dump(folder),)).run(graph)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00_input.ir", "02_prefix-dedup.ir", "03_chunk-prefill.ir", "index.md"]
    assert parse_graph((folder / names[0]).read_text(), "x") == graph
    last = (folder / names[2]).read_text()
    assert parse_graph(last, "x") == result
    command = "// sagellm-ir ir opt --pipeline 'chunk-prefill{tokens=16}' 02_prefix-dedup.ir"
    assert last.splitlines()[0] == command
    index = (folder / "index.md").read_text()
    assert "| 01 | `kv-reuse` |  | 4 | unchanged |" in index
    assert "[02_prefix-dedup.ir](02_prefix-dedup.ir) | 5 | prefill +1 |" in index


def test_a_folder_that_cannot_be_made_is_a_diagnostic(graph: IRGraph, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SageIRError, match="cannot make the folder"):
        PassManager(pipeline(Nothing()), (Dump(tmp_path / "file" / "x"),)).run(graph)


def test_a_failure_leaves_a_reproducer(graph: IRGraph, tmp_path: Path) -> None:
    path = tmp_path / "repro.ir"
    instruments = (Dump(tmp_path / "d"), Reproducer(path))
    broken = pipeline(*Pipeline.parse("prefix-dedup"), Crash())
    with pytest.raises(PassError, match=r"repro\.ir"):
        PassManager(broken, instruments).run(graph)
    text = path.read_text()
    assert text.startswith("// RUN: --pipeline crash\n")
    assert "**failed**" in (tmp_path / "d" / "index.md").read_text()
    path.write_text(text.replace("crash", "'chunk-prefill{tokens=16}'"))
    passes, before = read_reproducer(path)
    assert passes == Pipeline.parse("chunk-prefill{tokens=16}")
    assert before == PassManager(Pipeline.parse("prefix-dedup")).run(graph)


@pytest.mark.parametrize(
    "text",
    ["", "sagellm_ir 1\n", "// RUN: --pipeline 'a\n", "// RUN: --pipeline a b\n", "// RUN: -p a\n"],
)
def test_what_is_no_reproducer_is_a_diagnostic(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ir"
    path.write_text(text)
    with pytest.raises(SageIRError, match="names no pipeline"):
        read_reproducer(path)
    with pytest.raises(SageIRError, match="cannot read"):
        read_reproducer(tmp_path / "missing.ir")


def test_instruments_nest(graph: IRGraph) -> None:
    seen: list[str] = []

    class Watch(Instrument):
        def __init__(self, name: str) -> None:
            self.name = name

        def before(self, run: PassRun) -> None:
            seen.append(f"{self.name} before {run.index}")

        def after(self, run: PassRun) -> None:
            seen.append(f"{self.name} after {run.index}")

    PassManager(pipeline(Nothing()), (Watch("a"), Watch("b"))).run(graph)
    assert seen == ["a before 1", "b before 1", "b after 1", "a after 1"]


def test_nothing_goes_to_stdout(graph: IRGraph, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    instruments = (Timing(), Statistics(), Diff(seen.append))
    PassManager(Pipeline.parse("prefix-dedup"), instruments).run(graph)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_max_rewrites_is_for_all_passes_together(graph: IRGraph, count: int) -> None:
    result = PassManager(pipeline(Rename(), Nothing(), Rename()), max_rewrites=count).run(graph)
    renamed = [node.name for node in result.nodes if node.name.startswith("x")]
    assert len(renamed) == min(count, 2)


def test_bisect_finds_the_first_bad_rewrite(graph: IRGraph) -> None:
    def has(name: str) -> int | None:
        return bisect(pipeline(Rename()), graph, lambda result: name in result.by_name)

    assert has("p0") == 0
    assert has("x2") == 1
    assert has("x3") == 2
    assert has("never") is None
    assert bisect(pipeline(Crash()), graph, lambda result: False) == 0
    many = graph.replace(
        requests=tuple(RequestDecl(f"r{i}", prompt_len=4) for i in range(100)),
        nodes=tuple(
            node
            for i in range(100)
            for node in (
                Prefill(f"p{i}", f"r{i}", 0, 4),
                Decode(f"d{i}", f"r{i}", 4, 132, operands=(f"p{i}",)),
            )
        ),
    )
    assert bisect(pipeline(Rename()), many, lambda result: "x73" in print_graph(result)) == 37


def test_a_graph_between_passes_goes_with_its_last_use(graph: IRGraph) -> None:
    """Without the cyclic collector, which rests while a large workload is compiled."""
    seen: list[ref[IRGraph]] = []

    class Watch(Instrument):
        def after(self, run: PassRun) -> None:
            seen.append(ref(run.result))

    gc.disable()
    try:
        result = PassManager(Pipeline.parse("O2"), (Watch(),)).run(graph)
        alive = {id(found()) for found in seen if found() is not None}
    finally:
        gc.enable()
    assert len(seen) > 4
    assert alive == {id(result)}


def test_columns_go_over_to_another_stage(graph: IRGraph) -> None:
    columns = graph.columns
    placed = graph.replace(stage="placed")
    assert placed.columns.index is columns.index
    assert placed.columns.graph is placed
    assert columns.graph is graph
