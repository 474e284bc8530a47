"""What a plan is compiled for: the model's shape, the device's speed, tiers, budgets and workers."""

from attrs import field, frozen, validators

__all__ = ["DEVICE", "HOST", "Device", "ModelSpec", "Target", "Tier", "Worker"]

DEVICE = "device"
"""The tier attention reads from."""
HOST = "host"


@frozen
class ModelSpec:
    """The shape of a decoder-only transformer: what cost and KV size depend on."""

    name: str = "smollm2-135m"
    layers: int = field(default=30, validator=validators.gt(0))
    hidden: int = field(default=576, validator=validators.gt(0))
    heads: int = field(default=9, validator=validators.gt(0))
    kv_heads: int = field(default=3, validator=validators.gt(0))
    head_dim: int = field(default=64, validator=validators.gt(0))
    intermediate: int = field(default=1536, validator=validators.gt(0))
    vocab: int = field(default=49152, validator=validators.gt(0))
    dtype_bytes: int = field(default=4, validator=validators.gt(0))
    """Bytes of one weight, and, unless `kv_head_bytes` says otherwise, of one KV element."""
    kv_head_bytes: int = field(default=0, validator=validators.ge(0))
    """Bytes of one token's key, or value, of one head, with its scales where KV is stored in another
    type than weights; 0: `head_dim * dtype_bytes`."""

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of all layers, in bytes."""
        head = self.kv_head_bytes or self.head_dim * self.dtype_bytes
        return 2 * self.layers * self.kv_heads * head

    @property
    def layer_params(self) -> int:
        """Weights that every token passes through in the layers: attention and gated MLP."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_params(self) -> int:
        """Weights of the output projection: used by one row a sequence."""
        return self.hidden * self.vocab


@frozen
class Device:
    """Sustained speed of one worker's device. Presets name the source of each figure."""

    name: str = "cpu"
    flops: float = field(default=2.0e11, validator=validators.gt(0))
    """Dense matrix arithmetic, FLOP/s."""
    bandwidth: float = field(default=2.0e10, validator=validators.gt(0))
    """Memory bandwidth, bytes/s."""
    step_overhead: float = field(default=1.0e-3, validator=validators.ge(0))
    """Fixed cost of one forward, seconds."""
    allreduce_latency: float = field(default=0.0, validator=validators.ge(0))
    """Fixed cost of one collective call, seconds."""
    allreduce_bandwidth: float = field(default=1.0e9, validator=validators.gt(0))
    """Bytes/s through one collective."""


@frozen
class Tier:
    """A place KV can live in, on each worker."""

    name: str
    blocks: int = field(validator=validators.ge(0))
    """Capacity in blocks, on each worker."""
    bandwidth: float = field(default=1.0e10, validator=validators.gt(0))
    """Bytes/s between this tier and the device; for `device` itself, between workers."""
    latency: float = field(default=0.0, validator=validators.ge(0))
    """Fixed cost of one transfer, seconds."""


@frozen
class Worker:
    """One replica of the model (all its tensor-parallel ranks)."""

    name: str
    role: str = field(default="general", validator=validators.in_(("general", "prefill", "decode")))


@frozen
class Target:
    """What a plan is for. Budgets are per step and worker.

    The KV pool of a worker is its `device` tier.
    """

    name: str = "cpu"
    engine: str = "embedded"
    block_size: int = field(default=16, validator=validators.gt(0))
    """Tokens of a KV block."""
    max_tokens: int = field(default=2048, validator=validators.gt(0))
    """Prefill and decode rows of one forward, at most."""
    max_batch: int = field(default=64, validator=validators.gt(0))
    """Sequences of one step, at most."""
    max_loops: int = field(default=16, validator=validators.gt(0))
    """Forwards of one decode-only step, at most."""
    tp: int = field(default=1, validator=validators.gt(0))
    """Tensor-parallel ranks of a worker."""
    mixed: bool = True
    """Whether one step may hold prefill chunks and decode rows."""
    model: ModelSpec = ModelSpec()
    device: Device = Device()
    tiers: tuple[Tier, ...] = (Tier(DEVICE, 4096), Tier(HOST, 16384))
    workers: tuple[Worker, ...] = (Worker("w0"),)

    def tier(self, name: str) -> Tier | None:
        """The tier called `name`, or None."""
        return next((tier for tier in self.tiers if tier.name == name), None)

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        return self.block_size * self.model.kv_bytes_per_token
