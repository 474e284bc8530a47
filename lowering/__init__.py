"""Graph -> plan."""
