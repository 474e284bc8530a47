"""LMDeploy in a mixed fleet, behind the real `ControlPlaneManager`.

Its genuine engine loop, scheduler, block manager and trie, driven by plans, behind our server; only
the forward is a stand-in, which answers each row with what the fleet's tiny model says to the tokens
that its block table holds. LMDeploy's own HTTP server is not in it.
"""

import asyncio
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from sagellm_ir.runtime.control_plane.packages import have
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.lmdeploy.engine import LMDeployBackend
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from tests.control_plane.mixed import answers_outlive, documents_stay_together, mixed_fleet
from tests.control_plane.tiny_fleet import MODEL, SHARED, tiny_engine
from tests.embedded.tiny import oracle
from tests.lmdeploy.cpu import engine

pytestmark = pytest.mark.skipif(
    not have("sagellm_control"),
    reason="isagellm-control-plane is not installed: make build/control-plane/.ready",
)


def likeliest(context: np.ndarray) -> int:
    return oracle(SHARED, context.tolist(), 1)[0]


@pytest.fixture
def make() -> Iterator[Callable[[str], SageLLMEngine]]:
    """An engine by its id: LMDeploy's under that name, else the embedded one."""
    with LMDeployBackend(
        lambda: engine(likeliest), stop_at_eos=False, tokenizer=SHARED.tokenizer
    ) as backend:
        loaded = LoadedBackend(backend, backend.target, SHARED.tokenizer, MODEL)

        def made(name: str) -> SageLLMEngine:
            return (
                SageLLMEngine(loaded, engine_id=name) if name == "lmdeploy" else tiny_engine(name)
            )

        yield made


def test_it_answers_as_the_others_and_keeps_a_document(
    make: Callable[[str], SageLLMEngine],
) -> None:
    async def run() -> None:
        async with mixed_fleet(make=make) as mixed:
            await documents_stay_together(mixed)

    asyncio.run(run())


@pytest.mark.parametrize("lost", [("lmdeploy",), ("sagellm-0", "sagellm-1", "vllm")])
def test_answers_leave_it_and_come_to_it(
    lost: tuple[str, ...], make: Callable[[str], SageLLMEngine]
) -> None:
    async def run() -> None:
        async with mixed_fleet(make=make) as mixed:
            await answers_outlive(mixed, lost)
            if "lmdeploy" not in lost:
                assert mixed.engines["lmdeploy"].load().finished > 3

    asyncio.run(run())
