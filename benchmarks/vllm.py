"""Default vLLM beside vLLM driven by plans: see `vllm_plans/vllm_compare.py`, which this runs."""

import runpy
import sys
from pathlib import Path

here = Path(__file__).parent
# `import vllm` must not find this file: so this folder comes last.
sys.path[:] = [str(here / "vllm_plans"), *sys.path[1:], str(here)]
runpy.run_module("vllm_compare", run_name="__main__")
