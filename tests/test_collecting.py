"""When the cyclic garbage collector runs."""

import gc
from collections.abc import Iterator

import pytest

from sagellm_ir.collecting import collect_early


@pytest.fixture
def threshold() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(("limit", "soon"), [(1_000, True), (1_000_000, False)])
def test_a_collection_that_is_soon_due_runs_early(threshold: None, limit: int, soon: bool) -> None:
    gc.collect()
    gc.set_threshold(1_000_000, 10, 10)
    made = [[number] for number in range(900)]
    gc.set_threshold(limit, 10, 10)
    collect_early()
    assert (gc.get_count()[0] < len(made)) is soon


def test_the_collector_is_left_alone_where_it_is_off(threshold: None) -> None:
    gc.set_threshold(10, 10, 10)
    gc.disable()
    try:
        made = [[number] for number in range(900)]
        collect_early()
        assert gc.get_count()[0] >= len(made)
    finally:
        gc.enable()
