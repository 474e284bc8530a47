"""The parts of the `evict` pass: live ranges, the sweep over the steps, and the new graph."""
