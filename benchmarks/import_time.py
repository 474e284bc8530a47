"""Time of `import sagellm_ir` in a fresh interpreter, beside an interpreter that imports nothing.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys
import time

from machine import describe

RUNS = 15


def seconds(code: str) -> float:
    """Median wall time of a fresh interpreter."""
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    print(describe("attrs", "networkx"))
    nothing, ours = seconds("pass"), seconds("import sagellm_ir")
    print(f"interpreter alone {nothing * 1e3:.0f} ms, with sagellm_ir {ours * 1e3:.0f} ms")
    print(f"import sagellm_ir: {(ours - nothing) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
