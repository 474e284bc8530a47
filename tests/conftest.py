"""Settings of all property tests: random examples on a desk, the same ones in every CI run."""

import os

from hypothesis import HealthCheck, settings

# No deadline: a busy machine is not a bug.
settings.register_profile("desk", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("desk"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")
