"""Plan -> tokens."""
