"""`no_collections`: a pause of Python's cyclic garbage collector while a compiler phase runs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_collections"]


@contextmanager
def no_collections() -> Iterator[None]:
    """Pauses cyclic collection, and restores what was there.

    A phase makes hundreds of thousands of objects that live on and form no cycles. Each full
    collection walks all of them to free nothing: a third of the time of compiling a large trace.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
