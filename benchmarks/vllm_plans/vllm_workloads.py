"""What `vllm.py` asks: sessions of turns. A plain request is a session of one turn."""

import random
from collections.abc import Callable

from attrs import frozen

__all__ = ["WORKLOADS", "Session", "Turn", "make"]

FIRST_TOKEN = 1000
"""Special tokens lie below it."""


@frozen
class Turn:
    """The next prompt of a session: all that was said before, and these tokens."""

    tokens: tuple[int, ...]
    new: int
    """Tokens of the answer."""


@frozen
class Session:
    """Turns, each asked when the one before is answered."""

    name: str
    turns: tuple[Turn, ...]


Tokens = Callable[[int], tuple[int, ...]]
"""So many random ones."""


def make(name: str, seed: int, vocab: int, scale: int = 1) -> list[Session]:
    """The sessions of a workload, in the order they come. `scale` multiplies all lengths."""
    rng = random.Random(f"{name} {seed}")
    turns = WORKLOADS[name](
        lambda count: tuple(rng.randrange(FIRST_TOKEN, vocab) for _ in range(count * scale))
    )
    rng.shuffle(turns)
    return [
        Session(f"{name}.{seed}.{at}", tuple(Turn(t, new * scale) for t, new in session))
        for at, session in enumerate(turns)
    ]


def _unshared(tokens: Tokens) -> list[list[tuple[tuple[int, ...], int]]]:
    """Twelve prompts that have nothing in common."""
    return [[(tokens(256), 24)] for _ in range(12)]


def _prompt(tokens: Tokens) -> list[list[tuple[tuple[int, ...], int]]]:
    """Sixteen questions behind one long system prompt, which fits the pool."""
    shared = tokens(768)
    return [[(shared + tokens(48), 24)] for _ in range(16)]


def _crowd(tokens: Tokens) -> list[list[tuple[tuple[int, ...], int]]]:
    """Forty-eight short questions behind one long system prompt."""
    shared = tokens(1024)
    return [[(shared + tokens(16), 16)] for _ in range(48)]


def _documents(tokens: Tokens) -> list[list[tuple[tuple[int, ...], int]]]:
    """Four questions about each of six documents, which do not fit the pool together; mixed."""
    shared = [tokens(640) for _ in range(6)]
    return [[(document + tokens(32), 16)] for _ in range(4) for document in shared]


def _agents(tokens: Tokens) -> list[list[tuple[tuple[int, ...], int]]]:
    """Eight agents of four turns behind one system prompt; their histories outgrow the pool."""
    shared = tokens(256)
    return [
        [((shared if turn == 0 else ()) + tokens(96), 16) for turn in range(4)] for _ in range(8)
    ]


WORKLOADS = {
    "unshared": _unshared,
    "system prompt": _prompt,
    "crowd": _crowd,
    "documents": _documents,
    "agents": _agents,
}
