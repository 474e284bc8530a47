"""Settings of the native libraries under torch. They read them once, when torch is loaded or first used."""

import os

__all__ = ["SETTINGS", "set_defaults"]

SETTINGS = {
    # OpenMP threads that spin while they wait stall each other on a busy machine; ones that sleep at
    # once wake too late for the next of a forward's thousand short products. About 50 us, then.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "20000",
    # Products are kept compiled by their number of rows, 1024 of them, twice over, up to gigabytes.
    # Rows differ from forward to forward, so that few are ever used again: 64 serve a steady batch.
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def set_defaults() -> None:
    """Set what the user has not set, for this process and those that it starts."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
