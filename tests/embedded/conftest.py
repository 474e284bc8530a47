"""Fixtures: a tiny model of each architecture and an engine around it."""

import pytest
import torch
from attrs import evolve

from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine, random_model
from sagellm_ir.target import DEVICE, HOST, Target, Tier, Worker
from tests.embedded.tiny import BLOCK, SEED, TINY


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two spinning threads on a busy machine are slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    """Random weights, both architectures."""
    config = evolve(TINY, architecture=request.param, qkv_bias=request.param == "qwen2")
    return random_model(config, seed=SEED)


@pytest.fixture
def target(model: CausalLM) -> Target:
    """Small blocks and a small pool."""
    tiers = (Tier(DEVICE, 64), Tier(HOST, 32))
    workers = (Worker("w0"), Worker("w1"))
    return Target(block_size=BLOCK, tiers=tiers, workers=workers, model=model.spec)


@pytest.fixture
def engine(model: CausalLM, target: Target) -> EmbeddedEngine:
    """An engine with nothing submitted."""
    return EmbeddedEngine(model, target)
