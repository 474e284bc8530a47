"""Pipelines as text, the registry, and what they say about mistakes."""

from contextlib import suppress
from importlib.metadata import EntryPoint

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.passes import registry
from sagellm_ir.passes.base import Pass
from sagellm_ir.passes.chunk_prefill import ChunkPrefill
from sagellm_ir.passes.manager import check_stages
from sagellm_ir.passes.pipeline import PRESETS, Pipeline
from sagellm_ir.passes.prefix_dedup import PrefixDedup
from sagellm_ir.passes.registry import PASSES, find_pass, pass_names


@pytest.mark.parametrize("name", PASSES)
def test_every_entry_is_a_pass_of_its_name(name: str) -> None:
    cls = find_pass(name)
    assert issubclass(cls, Pass)
    assert cls.name == name
    assert cls.summary().endswith(".")
    assert Pipeline.parse(name).passes == (cls(),), "options have defaults"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_a_built_graph_to_a_schedule(name: str) -> None:
    assert check_stages(Pipeline.parse(name).passes, "built") == "scheduled"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "canonicalize",
        "canonicalize,prefix-dedup{min_tokens=64, gated=false},chunk-prefill{tokens=7}",
    ],
)
def test_text_survives(text: str) -> None:
    assert str(Pipeline.parse(text)) == text


@settings(deadline=None)
@given(
    st.lists(
        st.builds(PrefixDedup, min_tokens=st.integers(1, 999), gated=st.booleans())
        | st.builds(ChunkPrefill, tokens=st.none() | st.integers(1, 999))
    )
)
def test_pipelines_survive(passes: list[Pass]) -> None:
    pipeline = Pipeline(tuple(passes))
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_only_options_that_differ_are_printed() -> None:
    text = " chunk-prefill { tokens = none } ,prefix-dedup{gated},canonicalize{} "
    assert str(Pipeline.parse(text)) == "chunk-prefill,prefix-dedup,canonicalize"


def test_before() -> None:
    pipeline = Pipeline.parse("canonicalize,kv-reuse,canonicalize")
    assert str(pipeline.before("kv-reuse")) == "canonicalize"
    assert pipeline.before("nothing") == pipeline


@pytest.mark.parametrize(
    ("text", "column", "message", "help_"),
    [
        ("canonicalize,prefx-dedup", 14, "no pass or preset", "did you mean 'prefix-dedup'?"),
        ("O7", 1, "no pass or preset", "known: O0"),
        ("O33", 1, "no pass or preset", "did you mean 'O3'?"),
        ("prefix-dedup{min_token=3}", 14, "no option 'min_token'", "did you mean 'min_tokens'?"),
        ("canonicalize{x=1}", 14, "no option 'x'", "it has no options"),
        ("prefix-dedup{min_tokens=x}", 25, "cannot be 'x'", ""),
        ("prefix-dedup{min_tokens=0}", 25, "cannot be '0'", "must be > 0"),
        ("prefix-dedup{gated=maybe}", 20, "cannot be 'maybe'", ""),
        ("prefix-dedup{gated, gated}", 21, "given twice", "keep one"),
        ("prefix-dedup{gated=false", 25, "expected ',' or '}', found the end", ""),
        ("canonicalize kv-reuse", 14, "expected ',', found 'kv-reuse'", ""),
        ("canonicalize,", 14, "expected the name of a pass, found the end", ""),
        ("chunk-prefill{tokens=}", 22, "expected a value, found '}'", ""),
        ('chunk-prefill{tokens="4}', 22, "has no end", 'close it with "'),
        ('chunk-prefill{tokens="\\q"}', 22, "not a JSON string", ""),
    ],
)
def test_mistakes_are_shown(text: str, column: int, message: str, help_: str) -> None:
    with pytest.raises(SageIRError) as caught:
        Pipeline.parse(text)
    found = caught.value.diagnostics[0]
    assert message in found.message
    assert help_ in found.help
    assert found.loc is not None
    assert found.loc.column == column
    assert found.window.splitlines()[1].index("^") == column + 1


@settings(deadline=None)
@given(st.text(alphabet='canoilze,{}="\\ \n=1', max_size=40))
def test_any_text_is_a_pipeline_or_a_diagnostic(text: str) -> None:
    with suppress(SageIRError):
        assert Pipeline.parse(str(Pipeline.parse(text))) == Pipeline.parse(text)


def _install(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    def entries(group: str, **select: str) -> list[EntryPoint]:
        found = EntryPoint(name, value, registry.GROUP)
        return [found] if group == registry.GROUP and select.get("name", name) == name else []

    monkeypatch.setattr(registry, "entry_points", entries)


def test_an_installed_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "nothing", "tests.passes.broken:Nothing")
    assert "nothing" in pass_names()
    assert str(Pipeline.parse("nothing{times=2}")) == "nothing{times=2}"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tests.passes.broken:Crash", "is not a Pass class whose name is 'other'"),
        ("no.such.module:X", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_broken_entry_point_is_reported(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    _install(monkeypatch, "other", value)
    with pytest.raises(SageIRError, match=message):
        find_pass("other")
