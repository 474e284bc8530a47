"""`verify_plan`: says everything that is wrong with a plan."""

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.lowering.replay import Replay

__all__ = ["PlanError", "verify_plan"]


class PlanError(SageIRError):
    """A plan that breaks a law of plans. Up to 20 diagnostics, in the order of the steps."""


def verify_plan(plan: ExecutionPlan) -> None:
    """Check that any engine can run `plan` and that it serves every request exactly once.

    Raises:
        PlanError: it does not; at most the first 20 findings.
    """
    replay = Replay(plan)
    replay.run()
    if replay.errors:
        raise PlanError(*replay.errors)
