"""An engine with a tiny random model: real forwards, milliseconds each."""

from collections.abc import Callable, Iterator

import pytest
import torch

from sagellm_ir.runtime import SageLLMEngine
from tests.server.serving import Served, serving
from tests.server.tiny import load_tiny

Make = Callable[..., SageLLMEngine]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two spinning threads on a busy machine are slower than one."""
    torch.set_num_threads(1)


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes started engines, and stops them after the test."""
    made: list[SageLLMEngine] = []

    def start(blocks: int = 64, **options: object) -> SageLLMEngine:
        engine = SageLLMEngine(load_tiny(blocks), **options)  # type: ignore[arg-type]
        made.append(engine)
        engine.start()
        return engine

    yield start
    for engine in made:
        engine.stop()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One server for the tests of a module that leave nothing behind."""
    torch.set_num_threads(1)
    engine = SageLLMEngine(load_tiny(512))
    engine.start()
    with serving(engine) as found:
        yield found
    engine.stop()
