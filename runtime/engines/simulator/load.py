"""`load_simulator`: the simulator as an engine that can be served. Its answers are numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve

from sagellm_ir.build import ByteTokenizer
from sagellm_ir.presets import load_model, load_target, model_names
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.simulator.engine import SimulatorEngine

__all__ = ["load_simulator"]


class _NumberTokenizer(ByteTokenizer):
    """Text goes in as bytes; what comes out are the made-up token ids, as numbers."""

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f" {token}" for token in tokens)


def load_simulator(
    model: str, *, target: str = "cpu", overrides: Mapping[str, Any] | None = None
) -> LoadedBackend:
    """The simulator, for `load_backend`.

    Args:
        model: a model preset gives its shape; any other name keeps the target's.
        target: a preset or a YAML file.
        overrides: fields of the target to change (see `load_target`).

    Raises:
        SageIRError: what `load_target` raises.
    """
    chosen = load_target(target, **(overrides or {}))
    if model in model_names():
        chosen = evolve(chosen, model=load_model(model))
    return LoadedBackend(SimulatorEngine(chosen), chosen, _NumberTokenizer(), model)
