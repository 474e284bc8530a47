"""Settings of native libraries."""

import os

import pytest

from sagellm_ir.cli.main import main
from sagellm_ir.runtime.native import SETTINGS, set_defaults


def test_a_command_sets_them_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert main(["--version"]) == 0
    assert {name: os.environ[name] for name in SETTINGS} == SETTINGS


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    set_defaults()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
