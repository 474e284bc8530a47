"""What every benchmark states: the machine and the versions it ran with."""

import os
import platform
from importlib import metadata

__all__ = ["describe"]


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(*packages: str) -> dict[str, str]:
    """The machine, its load, Python, and the versions of some packages."""
    facts = {
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "load": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
    }
    return facts | {name: metadata.version(name) for name in packages}
