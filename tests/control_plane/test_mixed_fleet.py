"""A mixed fleet behind the real `ControlPlaneManager`: two sageLLM engines of this process, and two
servers with an OpenAI API that are registered as vLLM and as LMDeploy.

Those two are real servers over HTTP, but what runs in them is our engine: this tests that kinds mix
and that answers move between them. `test_real_vllm.py` does it with vLLM's own server, and
`tests/lmdeploy/test_fleet.py` with LMDeploy's own engine.
"""

import asyncio

import pytest

from tests.control_plane.mixed import answers_outlive, documents_stay_together, mixed_fleet

pytestmark = pytest.mark.usefixtures("real_control_plane")


@pytest.mark.parametrize("policy", ["fifo", "priority", "slo_aware"])
def test_every_kind_answers_and_documents_stay_together(policy: str) -> None:
    """Grouping by prefix is the router's, under every scheduling policy."""

    async def run() -> None:
        async with mixed_fleet(policy) as mixed:
            await documents_stay_together(mixed)

    asyncio.run(run())


@pytest.mark.parametrize("lost", [("sagellm-0", "vllm"), ("vllm", "lmdeploy")])
def test_engines_die_mid_stream_and_no_request_is_lost(lost: tuple[str, ...]) -> None:
    async def run() -> None:
        async with mixed_fleet() as mixed:
            await answers_outlive(mixed, lost)

    asyncio.run(run())
