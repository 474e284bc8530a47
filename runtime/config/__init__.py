"""The configuration of a deployment: `config/sage_llm.yaml`, and the environment over it."""

from sagellm_ir.runtime.config.loader import (
    FILE_VARIABLE,
    Configuration,
    load_config,
    read_config,
)
from sagellm_ir.runtime.config.sections import (
    CommConfig,
    ControlPlaneConfig,
    EngineConfig,
    LimitsConfig,
    PatchesConfig,
    SageConfig,
    ServerConfig,
)

__all__ = [
    "FILE_VARIABLE",
    "CommConfig",
    "Configuration",
    "ControlPlaneConfig",
    "EngineConfig",
    "LimitsConfig",
    "PatchesConfig",
    "SageConfig",
    "ServerConfig",
    "load_config",
    "read_config",
]
