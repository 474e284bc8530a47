"""Plans for an LMDeploy that somebody else starts: its server, its benchmark, your script.

    sagellm-ir patches apply --target installed
    LMDEPLOY_PYTORCH_PLUGIN=sagellm_ir.runtime.engines.lmdeploy.plugin:attach lmdeploy serve api_server MODEL

`sage_llm.yaml` and the environment configure it as they do any engine: `engine.pipeline` names the
passes of the online planner, `accel` the attention.
"""

import logging
from typing import Any

import torch

from sagellm_ir.presets import load_target
from sagellm_ir.runtime.config import SageConfig, load_config
from sagellm_ir.runtime.engines.lmdeploy.online import OnlineSource, target_of
from sagellm_ir.runtime.engines.lmdeploy.scheduler import PlanDriver
from sagellm_ir.runtime.engines.lmdeploy.view import NamedSequences, Names
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.target import Target

__all__ = ["attach", "base_target", "prepare"]

logger = logging.getLogger(__name__)

_WINDOW = 64
"""Requests of one compilation: more are compiled while the prefills of the first are in flight."""


def attach(role: str, engine: Any = None) -> PlanDriver | None:
    """LMDeploy calls this (patch 0001): in each process, and when an engine has been made.

    An engine that plans cannot drive is left as it is.
    """
    config = load_config()
    if role == "process":
        prepare(config)
    if role != "engine":
        return None
    requests = NamedSequences(engine.scheduler, Names())
    target = target_of(engine, base_target(config))
    planner = OnlinePlanner(target, config.engine.pipeline, window=_WINDOW, outlast=True)
    source = OnlineSource(planner, requests)
    try:
        return PlanDriver(engine, source, requests)
    except ValueError as error:
        logger.warning("%s; LMDeploy schedules by its own rules", error)
        return None


def prepare(config: SageConfig) -> None:
    """Before a model is built in this process: its attention, on a GPU."""
    if torch.cuda.is_available():
        from sagellm_ir.runtime.engines.lmdeploy.kernels.prefix_aware_attention import install

        install(config.accel)


def base_target(config: SageConfig) -> Target:
    """The preset whose speeds are reckoned with: this machine's GPU, or else as configured."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = next((gpu for gpu in ("h100", "h200") if gpu in name.lower()), None)
    return load_target(found or config.engine.target)
