"""What engines check of the blocks that a plan names."""

from collections.abc import Mapping, Sequence

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import KVMove

__all__ = ["check_blocks", "check_move"]


def check_blocks(capacity: Mapping[str, int], tier: str, blocks: Sequence[int]) -> None:
    """Whether an engine has the blocks that a plan names.

    Args:
        capacity: blocks of each tier of the engine.

    Raises:
        SageIRError: there is no such tier, or it has fewer blocks.
    """
    if tier not in capacity:
        raise SageIRError(
            Diagnostic(f"the plan names tier {tier!r}; the engine has {list(capacity)}")
        )
    if blocks and not 0 <= min(blocks) <= max(blocks) < capacity[tier]:
        raise SageIRError(
            Diagnostic(
                f"the plan uses block {max(blocks)} of tier {tier!r}, which has "
                f"{capacity[tier]} blocks",
                help="compile the plan for this engine's target",
            )
        )


def check_move(move: KVMove) -> None:
    """Whether a move names one destination for each block.

    Raises:
        SageIRError: it does not.
    """
    if len(move.src) != len(move.dst):
        raise SageIRError(
            Diagnostic(f"a move of {len(move.src)} blocks names {len(move.dst)} destinations")
        )
