"""`make_attention`: our kernels, or None where an engine must use its own."""

import importlib.util
import logging
from typing import TYPE_CHECKING

import torch

from sagellm_ir.runtime.accel.config import AccelConfig
from sagellm_ir.runtime.accel.spec import AttentionSpec, unsupported

if TYPE_CHECKING:  # Imports triton.
    from sagellm_ir.runtime.accel.attention import PrefixAttention

__all__ = ["make_attention", "why_not"]

_LOG = logging.getLogger(__name__)
_SHARED_MEMORY = 132 << 10
"""Bytes a thread block needs: the largest tile, 128 rows at head_dim 128."""


def why_not(spec: AttentionSpec, device: torch.device | str) -> str | None:
    """Why the kernels cannot run there, in one phrase; None when they can."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'sagellm-ir[accel]')"
    if device.type != "cuda":
        return f"device {device} is not a CUDA device"
    properties = torch.cuda.get_device_properties(device)
    found: int = getattr(properties, "shared_memory_per_block_optin", 0)
    if found < _SHARED_MEMORY:
        return f"{device} has {found >> 10} KiB of shared memory, {_SHARED_MEMORY >> 10} are needed"
    return unsupported(spec)


def make_attention(
    config: AccelConfig,
    spec: AttentionSpec,
    *,
    max_batch: int,
    max_rows: int,
    device: torch.device | str,
) -> "PrefixAttention | None":
    """The kernels as `config` wants them; None for `off`, and where they cannot run (one log line).

    Args:
        config: see `AccelConfig`.
        spec: the attention's shape.
        max_batch: sequences of a batch.
        max_rows: query tokens of a batch.
        device: where the cache is.

    Raises:
        SageIRError: a size is out of range.
    """
    if config.mode == "off":
        return None
    if reason := why_not(spec, device):
        _LOG.warning("prefix-aware attention is off, the engine's own kernels run: %s", reason)
        return None
    from sagellm_ir.runtime.accel.attention import PrefixAttention

    return PrefixAttention(
        spec,
        max_batch=max_batch,
        max_rows=max_rows,
        device=device,
        gate=config.gate if config.mode == "auto" else None,
        workspace=config.workspace,
    )
