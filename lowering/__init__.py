"""Graph -> plan."""

from sagellm_ir.lowering.lower import lower

__all__ = ["lower"]
