"""The kernels run in Triton's interpreter here, on the CPU."""

import importlib
import os
import sys

import pytest

# Triton decides when it is imported whether it interprets: for this process, yes. The variable
# is taken back, so that processes started by other tests decide for themselves.
if "triton" in sys.modules:
    raise pytest.UsageError("tests/accel must be collected before anything imports triton")
os.environ["TRITON_INTERPRET"] = "1"
importlib.import_module("sagellm_ir.runtime.accel.kernels")
importlib.import_module("triton.experimental.gluon")  # Triton imports it at the first launch.
del os.environ["TRITON_INTERPRET"]
