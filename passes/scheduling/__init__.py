"""The parts of the `schedule` pass: the graph as flat arrays, the simulation, its record."""
