"""An LMDeploy engine that somebody else makes is driven by plans, by one environment variable."""

import asyncio
from typing import Any

import pytest
from lmdeploy.pytorch import envs

from sagellm_ir.runtime.engines.lmdeploy import plugin
from tests.lmdeploy.cpu import ask, engine, oracle, run

PLUGIN = "sagellm_ir.runtime.engines.lmdeploy.plugin:attach"


def test_the_environment_variable_attaches_the_online_planner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(envs, "pytorch_plugin", PLUGIN)
    monkeypatch.setenv("SAGELLM_ENGINE__TARGET", "h200")
    eng = engine()
    driver = eng.scheduler.plan_source
    assert driver.source.planner.target.device.name == "h200"
    prompts = [list(range(100, 228)) + [i] * 20 for i in range(6)]

    async def work() -> Any:
        return await asyncio.gather(*[ask(eng, i, p, 20) for i, p in enumerate(prompts)])

    assert run(work) == [oracle(prompt, 20) for prompt in prompts]
    assert (driver.rejected, driver.unplanned) == ([], 0)
    assert driver.stats.prefill_tokens == 148 + 5 * 20


def test_an_engine_that_plans_cannot_drive_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    eng = engine()
    eng.dist_config.dp = 2
    assert plugin.attach("engine", eng) is None
    assert "data parallelism" in caplog.text
    assert eng.scheduler.plan_source is None
    assert plugin.attach("process") is None
