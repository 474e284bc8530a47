"""`AttentionSpec`: the shape of one model's attention over a paged cache, and what is supported."""

import math
from functools import cached_property

import torch
from attrs import field, frozen, validators

__all__ = ["BLOCK_SIZES", "HEAD_DIMS", "KV_FORMATS", "AttentionSpec", "unsupported"]

BLOCK_SIZES = (16, 32, 64)
HEAD_DIMS = (64, 80, 96, 128, 256)
KV_FORMATS = ("native", "int8", "fp8")


@frozen(cache_hash=True)
class AttentionSpec:
    """One layer's attention on one rank. All layers of a model share a spec."""

    heads: int = field(validator=validators.gt(0))
    """Query heads."""
    kv_heads: int = field(validator=validators.gt(0))
    """KV heads; query head `h` reads KV head `h // (heads // kv_heads)`."""
    head_dim: int
    """Elements of a query, key or value head."""
    block_size: int
    """Tokens of a cache page."""
    dtype: torch.dtype = torch.bfloat16
    """Of queries, outputs and, unless `kv` says otherwise, of the cache."""
    kv: str = field(default="native", validator=validators.in_(KV_FORMATS))
    """`native`: as `dtype`. `int8`: uint8 with a scale and a zero point for each token and head,
    value `(x - zero) * scale` (LMDeploy's `quant_policy=8`). `fp8`: e4m3 with one scale for K and
    one for V."""
    scale: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Factor on the scores; None: `1 / sqrt(head_dim)`."""
    window: int = field(default=0, validator=validators.ge(0))
    """A query at position `p` sees keys `p - window < j <= p`; 0: all of `j <= p`.

    LMDeploy's `window_size=w` sees `w` keys before the query's own: pass `w + 1`."""
    softcap: float = field(default=0.0, validator=validators.ge(0.0))
    """Scores become `softcap * tanh(score / softcap)`; 0: unchanged."""
    sinks: bool = False
    """Whether each query head has a learned logit that joins the softmax without a value."""
    hopper: bool = True
    """Whether the device is an H100, H200 or the like; `PrefixAttention` looks by itself."""

    @cached_property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @cached_property
    def score_scale(self) -> float:
        """`scale`, or its default."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    @cached_property
    def cache_dtype(self) -> torch.dtype:
        """Type of the cache's elements."""
        return {"int8": torch.uint8, "fp8": torch.float8_e4m3fn}.get(self.kv, self.dtype)

    @cached_property
    def token_bytes(self) -> int:
        """K and V of one token in this layer, in bytes."""
        scales = 4 * self.dtype.itemsize if self.kv == "int8" else 0
        return self.kv_heads * (2 * self.head_dim * self.cache_dtype.itemsize + scales)


def unsupported(spec: AttentionSpec) -> str | None:
    """Why the kernels cannot serve a spec, in one phrase; None when they can."""
    if spec.heads % spec.kv_heads:
        return f"{spec.heads} query heads are not a multiple of {spec.kv_heads} KV heads"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim {spec.head_dim} is not one of {HEAD_DIMS}"
    if spec.block_size not in BLOCK_SIZES:
        return f"block_size {spec.block_size} is not one of {BLOCK_SIZES}"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {spec.dtype} is neither float16 nor bfloat16"
    return None
