"""The Control Plane's packages are installed by `make test`, where they can be had."""

import pytest
import torch

from sagellm_ir.runtime.control_plane.packages import have


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two spinning threads on a busy machine are slower than one."""
    torch.set_num_threads(1)


@pytest.fixture
def real_control_plane() -> None:
    """Skips, and says so, where the packages are not: they are built for CPython 3.11 only."""
    if not have("sagellm_control"):
        pytest.skip("isagellm-control-plane is not installed: make build/control-plane/.ready")
