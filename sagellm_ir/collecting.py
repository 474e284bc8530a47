"""When Python's cyclic garbage collector runs: not while a compiler phase does, nor in a decision."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collect_early", "no_collections"]

_MANY = 100_000
"""New objects that the next young collection should not walk."""


@contextmanager
def no_collections() -> Iterator[None]:
    """Pauses cyclic collection, and restores what was there.

    A phase makes hundreds of thousands of objects that live on and form no cycles. Each full
    collection walks all of them to free nothing: a third of the time of compiling a large trace.
    So if there are many, they count as old at the end, and wait for the next full collection.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if gc.get_count()[0] > _MANY and not gc.get_freeze_count():
                # Moves all objects to the oldest generation, without a walk.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def collect_early() -> None:
    """Runs the cyclic collection that is soon due, if one is: call it when it keeps nobody waiting.

    Otherwise it would run wherever the next object happens to be made. The generation is the one
    that Python would choose.
    """
    young, *older = gc.get_count()
    limit, *limits = gc.get_threshold()
    if gc.isenabled() and 4 * young > 3 * limit:
        due = [count > most for count, most in zip(older, limits, strict=True)]
        gc.collect(2 if due[1] else 1 if due[0] else 0)
