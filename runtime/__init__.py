"""Plan -> tokens."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagellm_ir.runtime.engines.sagellm import SageLLMEngine

__all__ = ["SageLLMEngine"]


def __getattr__(name: str) -> Any:
    """`SageLLMEngine`, imported when it is asked for: most users of this package need no planner."""
    if name == "SageLLMEngine":
        from sagellm_ir.runtime.engines.sagellm import SageLLMEngine

        return SageLLMEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
