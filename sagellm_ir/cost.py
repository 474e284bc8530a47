"""A roofline cost model: what a forward, a KV transfer or a collective costs on a target.

A forward takes the longer of its arithmetic and its memory traffic, plus a fixed overhead
(S. Williams et al., "Roofline", CACM 2009). Arithmetic: 2 FLOPs per weight and token, and 4 per
query-key pair, head and head dimension (J. Kaplan et al., arXiv 2001.08361, table 1). Traffic:
all weights once, and the KV that is read and written.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from attrs import frozen

from sagellm_ir.target import Target

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

__all__ = ["CostModel"]


@frozen
class CostModel:
    """Costs on one target, in seconds. Tensor-parallel ranks share the work of a forward evenly."""

    target: Target

    @cached_property
    def token_flops(self) -> float:
        """FLOPs of one token through the layers, attention scores left out."""
        return 2.0 * self.target.model.layer_params / self.target.tp

    @cached_property
    def pair_flops(self) -> float:
        """FLOPs of one query-key pair: scores and weighted sum, all heads and layers."""
        model = self.target.model
        return 4.0 * model.layers * model.heads * model.head_dim / self.target.tp

    @cached_property
    def logit_flops(self) -> float:
        """FLOPs of one row through the output projection."""
        return 2.0 * self.target.model.head_params / self.target.tp

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of weights one forward reads on each rank."""
        model = self.target.model
        return (model.layer_params + model.head_params) * model.dtype_bytes / self.target.tp

    @cached_property
    def kv_token_bytes(self) -> float:
        """Bytes of one token's KV on each rank."""
        return self.target.model.kv_bytes_per_token / self.target.tp

    def forward(self, tokens: int, pairs: int, kv_tokens: int, logits: int) -> float:
        """One forward.

        Args:
            tokens: rows, prefill tokens and decode rows together.
            pairs: query-key pairs of attention, summed over the rows.
            kv_tokens: tokens of KV read; a prefix that is read once for a group counts once.
            logits: rows that go through the output projection.
        """
        device = self.target.device
        flops = tokens * self.token_flops + pairs * self.pair_flops + logits * self.logit_flops
        traffic = self.weight_bytes + (kv_tokens + tokens) * self.kv_token_bytes
        return device.step_overhead + max(flops / device.flops, traffic / device.bandwidth)

    @overload
    def prefill(self, start: int, stop: int) -> float: ...
    @overload
    def prefill(self, start: "Ints", stop: "Ints") -> "Floats": ...
    def prefill(self, start: Any, stop: Any) -> Any:
        """Arithmetic of prompt tokens `[start, stop)` inside a forward that runs anyway."""
        tokens = stop - start
        pairs = tokens * (start + stop + 1) // 2
        flops = tokens * self.token_flops + pairs * self.pair_flops
        return flops / self.target.device.flops

    @overload
    def saved(self, start: int, stop: int) -> float: ...
    @overload
    def saved(self, start: "Ints", stop: "Ints") -> "Floats": ...
    def saved(self, start: Any, stop: Any) -> Any:
        """What it saves not to compute prompt tokens `[start, stop)`: their arithmetic, and their part of
        the fixed cost of forwards, as a forward holds only so many tokens."""
        share = self.target.device.step_overhead / self.target.max_tokens
        return self.prefill(start, stop) + (stop - start) * share

    def transfer(self, blocks: int, tier: str) -> float:
        """Moving `blocks` between a tier and the device (`device`: between workers).

        Raises:
            KeyError: the target has no such tier.
        """
        found = self.target.tier(tier)
        if found is None:
            raise KeyError(tier)
        return found.latency + blocks * self.target.block_bytes / found.bandwidth

    def allreduce(self, payload: int, calls: int) -> float:
        """`calls` ring all-reduces of `payload` bytes: 2 (n-1)/n of it crosses each link.

        Source of the factor: P. Patarasuk and X. Yuan, JPDC 69(2), 2009.
        """
        device, ranks = self.target.device, self.target.tp
        wire = 2.0 * (ranks - 1) / ranks * payload
        return calls * (device.allreduce_latency + wire / device.allreduce_bandwidth)
