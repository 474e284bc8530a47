"""The simulator: plans in virtual time, by the cost model."""

from sagellm_ir.runtime.engines.simulator.engine import SimulatorEngine
from sagellm_ir.runtime.engines.simulator.report import RequestReport, SimulationReport

__all__ = ["RequestReport", "SimulationReport", "SimulatorEngine"]
