"""`AccelConfig`: which attention runs, the section `accel` of `config/sage_llm.yaml`."""

from attrs import field, frozen, validators

from sagellm_ir.located_yaml import one_of
from sagellm_ir.runtime.accel.gate import Gate

__all__ = ["MODES", "AccelConfig"]

MODES = ("auto", "off", "prefix_aware")


@frozen
class AccelConfig:
    """How an engine on a GPU attends."""

    mode: str = field(default="auto", validator=one_of(MODES))
    """`auto`: our kernels, sharing where the gate says that it pays. `prefix_aware`: our kernels,
    sharing whatever two sequences have in common. `off`: the engine's own kernels."""
    workspace: int = field(default=128 << 20, validator=validators.ge(0))
    """Bytes for partial outputs, on each GPU."""
    gate: Gate = field(factory=Gate)
