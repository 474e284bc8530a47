"""The types of `runtime/protocols`."""

import pytest

from sagellm_ir.runtime.protocols import DOMESTIC, CapabilityDescriptor


@pytest.mark.parametrize("device", DOMESTIC)
def test_domestic_accelerators(device: str) -> None:
    assert CapabilityDescriptor("any", device=device).is_domestic
    assert not CapabilityDescriptor("any", device="cuda").is_domestic


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device"):
        CapabilityDescriptor("any", device="quantum")
