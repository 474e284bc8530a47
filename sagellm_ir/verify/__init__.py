"""The laws of the IR: one function a law, one message each, grouped by what they are about.

That no KV is used after it is freed is no law of graphs: nothing frees KV here but the end of its
uses. It is a law of plans, and `sagellm_ir.lowering.verify_plan` checks it.
"""

from sagellm_ir.verify.capacity import check_capacity
from sagellm_ir.verify.report import VerifyError
from sagellm_ir.verify.verifier import verify

__all__ = ["VerifyError", "check_capacity", "verify"]
