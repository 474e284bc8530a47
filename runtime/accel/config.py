"""`AccelConfig`: which attention runs, from the key `accel` of `config/sage_llm.yaml`."""

from pathlib import Path

from attrs import field, frozen, validators

from sagellm_ir.located_yaml import LocatedYAML
from sagellm_ir.presets import config_folder
from sagellm_ir.runtime.accel.gate import Gate

__all__ = ["MODES", "AccelConfig", "load_accel"]

MODES = ("auto", "off", "prefix_aware")


@frozen
class AccelConfig:
    """How an engine on a GPU attends."""

    mode: str = field(default="auto", validator=validators.in_(MODES))
    """`auto`: our kernels, sharing where the gate says that it pays. `prefix_aware`: our kernels,
    sharing whatever two sequences have in common. `off`: the engine's own kernels."""
    workspace: int = field(default=128 << 20, validator=validators.ge(0))
    """Bytes for partial outputs, on each GPU."""
    gate: Gate = field(factory=Gate)


def load_accel(path: str | Path | None = None) -> AccelConfig:
    """The `accel` key of a YAML file; without the key, the defaults.

    Args:
        path: the file; None: `sage_llm.yaml` of the presets.

    Raises:
        SageIRError: the file cannot be read, or a field is unknown or of the wrong type or value.
    """
    file = LocatedYAML(Path(path) if path is not None else config_folder() / "sage_llm.yaml")
    values = file.values.get("accel", {})
    if isinstance(values, dict) and values.get("mode") is False:
        values = values | {"mode": "off"}  # YAML 1.1 reads a bare `off` as false.
    return file.structure(values, AccelConfig, ("accel",))
