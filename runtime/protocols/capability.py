"""`CapabilityDescriptor`: what an engine can run, and on what."""

from attrs import field, frozen, validators

__all__ = ["DEVICE_KINDS", "DOMESTIC", "CapabilityDescriptor"]

DOMESTIC = ("ascend", "cambricon")
"""Accelerators that a routing policy may be asked to prefer."""
DEVICE_KINDS = ("cpu", "cuda", "rocm", "xpu", *DOMESTIC, "virtual")
"""What an engine computes on; `virtual`: on nothing, in virtual time."""


@frozen
class CapabilityDescriptor:
    """What an engine can run. A target that asks for more is refused before anything runs."""

    engine: str
    """The engine kind, as `load_backend` names it."""
    device: str = field(default="cpu", validator=validators.in_(DEVICE_KINDS))
    """What it computes on: one of `DEVICE_KINDS`."""
    device_name: str | None = None
    """The device as its maker calls it; None when the engine does not tell."""
    device_memory: int | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Bytes of one device; None when the engine does not tell."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Types of weights and activations, by their torch names."""
    kv_dtypes: tuple[str, ...] = ("fp32", "bf16")
    """Types that KV pages can be stored in: the names of `KVCacheSchema.dtype`."""
    tiers: tuple[str, ...] = ("device", "host")
    """Where KV can live."""
    block_size_multiple: int = field(default=1, validator=validators.gt(0))
    """A block's tokens must be a multiple of this."""
    reserved_blocks: tuple[int, ...] = ()
    """Device blocks that a plan must not use."""
    max_model_len: int | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Tokens of prompt and answer together, at most; None: as many as the pool holds."""
    max_tp: int = field(default=1, validator=validators.gt(0))
    """Tensor-parallel ranks of one worker, at most."""
    mixed: bool = True
    """Whether one step may hold prefill chunks and decode rows."""
    prefix_groups: bool = True
    """Whether the engine attends to a shared prefix once for all rows of a group."""
    supports_stop_strings: bool = True
    """Whether an answer can end at a text; else only at tokens."""
    supports_seed: bool = True
    """Whether seeded sampling gives the same tokens again."""
    supports_logprobs: bool = False
    """Whether the log-probabilities of tokens can be had."""
    supports_kv_transfer: bool = False
    """Whether KV blocks can be taken out and put in, as `TransportEngine` does."""

    @property
    def is_domestic(self) -> bool:
        """Whether it runs on one of the accelerators in `DOMESTIC`."""
        return self.device in DOMESTIC
