"""Graph -> graph."""
