"""The configuration: what a file and the environment say, and where each value is from."""

from pathlib import Path

import pytest
from attrs import evolve, fields, has
from typer.testing import CliRunner

from sagellm_ir.cli.main import app
from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.config import SageConfig, load_config, read_config
from sagellm_ir.runtime.ports import recommended_llm_port


def written(folder: Path, text: str) -> Path:
    """A file with this text."""
    path = folder / "sage.yaml"
    path.write_text(text)
    return path


def test_the_packaged_file_says_the_defaults() -> None:
    assert load_config(env={}) == SageConfig()
    assert SageConfig().server.port == recommended_llm_port()


def test_the_packaged_file_names_every_field_but_accels() -> None:
    origins = read_config(env={}).origins
    for section in fields(SageConfig):
        assert (section.name,) in origins
    unsaid = {name for name, _, origin in read_config(env={}).rows() if origin == "default"}
    assert {name for name in unsaid if not name.startswith("accel.")} == {
        "kv_schema.dtype",
        "kv_schema.profile",
    }


def test_the_environment_wins_over_the_file_over_the_default(tmp_path: Path) -> None:
    path = written(tmp_path, "engine:\n  id: one\n  model: two\nlimits:\n")
    env = {
        "SAGELLM_ENGINE__ID": "007",
        "SAGELLM_SERVER__API_KEYS": "a,b",
        "SAGELLM_ACCEL__GATE__LAUNCH": "2e-6",
        "SAGELLM_PATCHES__TARGET": "",
        "SAGELLM_CP_ENGINE_HOST": "is not ours",
    }
    found = read_config(path, env)
    config = found.config
    assert (config.engine.id, config.engine.model, config.engine.dtype) == ("007", "two", "float32")
    assert config.server.api_keys == ("a", "b")
    assert config.accel.gate == evolve(SageConfig().accel.gate, launch=2e-6)
    origins = {name: origin for name, _, origin in found.rows()}
    assert origins["engine.id"] == "environment variable SAGELLM_ENGINE__ID"
    assert origins["engine.model"] == f"{path}:3:10"
    assert origins["engine.dtype"] == "default"
    assert origins["server.port"].startswith("default, from the ports of ")
    assert config.patches.target is None


def test_a_variable_can_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "engine: {id: mine}")
    assert load_config(env={"SAGELLM_CONFIG": str(path)}).engine.id == "mine"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("engin: {}", (":1:", "engin: unknown field", "did you mean 'engine'?")),
        ("server:\n  prot: 1", (":2:", "server.prot: unknown field", "did you mean 'port'?")),
        ("comm:\n  timeout: soon", (":2:12", "comm.timeout: expected a number, got 'soon'")),
        ("kv_schema: {preset: fp9}", (":1:21", "expected one of auto, bf16", "did you mean 'fp8'")),
        ("kv_schema: {preset: fp8, dtype: int8}", (":1:33", "give one")),
        ("engine: 3", (":1:9", "engine: expected a mapping")),
        ("server: {api_keys: secret}", (":1:20", "expected a list")),
        ("server: {port: -1}", (":1:16", "server.port")),
        ("control_plane: {prefer: [cuda]}", (":1:", "ascend, cambricon")),
        ("engine: {id: a}\nengine: {id: b}", (":2:1", "given twice")),
        ("engine: [", ("is not YAML",)),
    ],
)
def test_a_wrong_file_is_reported_at_its_line(
    tmp_path: Path, text: str, parts: tuple[str, ...]
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SageIRError) as caught:
        load_config(path, env={})
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("SAGELLM_ENGIN__ID", "x", ("'engin'", "did you mean 'engine'?")),
        ("SAGELLM_ENGINE__MODLE", "x", ("engine has no field 'modle'", "did you mean 'model'?")),
        ("SAGELLM_ENGINE__ID__DEEP", "x", ("engine.id has no field 'deep'",)),
        ("SAGELLM_COMM__TIMEOUT", "soon", ("comm.timeout: expected a number",)),
        ("SAGELLM_LIMITS__WAITING", "-1", ("limits.waiting",)),
        ("SAGELLM_LIMITS__WAITING", "{[", ("not YAML",)),
        ("SAGELLM_ACCEL__GATE", "{}", ("SAGELLM_ACCEL__GATE__<FIELD>",)),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(SageIRError) as caught:
        load_config(env={name: value})
    for part in (f"environment variable {name}", *parts):
        assert part in str(caught.value)


def test_a_variable_does_not_hide_a_wrong_section(tmp_path: Path) -> None:
    with pytest.raises(SageIRError, match="engine: expected a mapping"):
        load_config(written(tmp_path, "engine: 3"), env={"SAGELLM_ENGINE__ID": "x"})


def test_what_show_prints_reads_back(tmp_path: Path) -> None:
    env = {"SAGELLM_CONFIG": "", "SAGELLM_ENGINE__ID": "on", "SAGELLM_ACCEL__MODE": "off"}
    printed = CliRunner().invoke(app, ["config", "show"], env=env)
    assert printed.exit_code == 0, printed.stderr
    assert load_config(written(tmp_path, printed.stdout), env={}) == load_config(env=env)


@pytest.mark.parametrize("options", [["--json"], ["--origin"], ["--origin", "--json"], []])
def test_show_masks_secrets(options: list[str]) -> None:
    env = {"SAGELLM_SERVER__API_KEYS": "hunter2"}
    printed = CliRunner().invoke(app, ["config", "show", *options], env=env)
    assert printed.exit_code == 0, printed.stderr
    assert "hunter2" not in printed.output
    assert "***" in printed.output
    assert "hunter2" not in repr(load_config(env=env))


def test_every_field_is_documented() -> None:
    from sagellm_ir.lowering.schema import schema_of

    undocumented = [
        f"{section.name}.{name}"
        for section in fields(SageConfig)
        if section.type is not None and has(section.type)
        for name, shown in schema_of(section.type)["properties"].items()
        if not shown.get("description")
    ]
    # `gate` is a class with a docstring of its own.
    assert undocumented == ["accel.gate"]
