"""Puts the patched LMDeploy on the path; where it cannot be had, every file here is skipped."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.lmdeploy import trees

HERE = trees.prepare()


class Missing(pytest.Module):
    """A test file that is not imported, as LMDeploy is not here."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip("LMDeploy is not here; 'make build/lmdeploy/.ready' brings it")


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Skip with a reason instead of failing to import."""
    return None if HERE else Missing.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def stock() -> Any:
    """What stock LMDeploy decides on the recorded workloads, and its defects."""
    return trees.recorded()
