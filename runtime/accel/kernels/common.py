"""Constants that the kernels share."""

import triton.language as tl

__all__ = ["ITEM_FIELDS", "LOG2E", "NEG_INF", "ROW_FIELDS"]

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
ITEM_FIELDS = tl.constexpr(8)
"""A work item, from the host (shared) and from the device (private) alike: sequence whose table
has the pages; first key; end of the chunk (private: may lie behind the last key); tokens of the
sequence (private); first of the queries (shared: an index of `rows`); their number; tile of `BM`
packed rows; first partial, or -1: write the output."""
ROW_FIELDS = tl.constexpr(8)
"""What `merge` knows of a query row: its partials; the private ones: first (less what the shared
ones would take) and distance; the shared ones: number and first entry in the host's table."""
