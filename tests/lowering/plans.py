"""Hypothesis strategies: small workloads, and the plans lowered from them."""

from hypothesis import strategies as st

from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.target import Target, Tier
from tests.lowering.toy import scheduled

__all__ = ["BLOCK", "decls", "graphs", "targets"]

BLOCK = 4


@st.composite
def decls(draw: st.DrawFn, most: int = 6) -> tuple[RequestDecl, ...]:
    """Requests whose prompts come from a few branching documents."""
    ids: dict[tuple[int, ...], int] = {}
    made = []
    for number in range(draw(st.integers(1, most))):
        path = tuple(draw(st.lists(st.integers(0, 1), max_size=5)))
        tail = draw(st.integers(0, BLOCK - 1))
        blocks = tuple(ids.setdefault(path[: at + 1], len(ids)) for at in range(len(path)))
        length = len(path) * BLOCK + tail
        made.append(
            RequestDecl(
                f"r{number}",
                max_new_tokens=draw(st.integers(1, 9)),
                prompt_len=max(length, 1),
                blocks=blocks,
            )
        )
    return tuple(made)


@st.composite
def targets(draw: st.DrawFn) -> Target:
    """Targets with an ample pool and tight budgets."""
    return Target(
        block_size=BLOCK,
        max_tokens=draw(st.integers(8, 24)),
        max_batch=draw(st.integers(1, 6)),
        max_loops=draw(st.integers(1, 4)),
        mixed=draw(st.booleans()),
        tiers=(Tier("device", 200), Tier("host", 100)),
    )


@st.composite
def graphs(draw: st.DrawFn) -> IRGraph:
    """Scheduled graphs."""
    return scheduled(draw(targets()), draw(decls()))
