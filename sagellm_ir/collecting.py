"""`no_collections`: a pause of Python's cyclic garbage collector while a compiler phase runs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_collections"]

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
