"""Plans for an LMDeploy that somebody else starts: its server, its benchmark, your script.

    sage infer patches apply --target installed
    LMDEPLOY_PYTORCH_PLUGIN=sagellm_ir.runtime.engines.lmdeploy.plugin:attach lmdeploy serve api_server MODEL

`SAGELLM_IR_PIPELINE` names the passes of the online planner (default O2), `SAGELLM_IR_TARGET` the
preset whose speeds they reckon with.
"""

import logging
import os
from typing import Any

from sagellm_ir.presets import load_target
from sagellm_ir.runtime.engines.lmdeploy.online import OnlineSource, target_of
from sagellm_ir.runtime.engines.lmdeploy.scheduler import PlanDriver
from sagellm_ir.runtime.engines.lmdeploy.view import Names
from sagellm_ir.runtime.planner import OnlinePlanner

__all__ = ["attach"]

logger = logging.getLogger(__name__)


def attach(role: str, engine: Any = None) -> PlanDriver | None:
    """LMDeploy calls this (patch 0001); an engine that plans cannot drive is left as it is."""
    if role != "engine":
        return None
    preset = os.environ.get("SAGELLM_IR_TARGET")
    pipeline = os.environ.get("SAGELLM_IR_PIPELINE", "O2")
    target = target_of(engine, load_target(preset) if preset else None)
    names = Names()
    source = OnlineSource(OnlinePlanner(target, pipeline), engine.scheduler, names)
    try:
        return PlanDriver(engine, source, names)
    except ValueError as error:
        logger.warning("%s; LMDeploy schedules by its own rules", error)
        return None
