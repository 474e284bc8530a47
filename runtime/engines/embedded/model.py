"""The forward of Llama and Qwen2 over a paged KV cache."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from sagellm_ir.runtime.engines.embedded import ops
from sagellm_ir.runtime.engines.embedded.kernels import Attend
from sagellm_ir.runtime.engines.embedded.model_config import ModelConfig
from sagellm_ir.runtime.engines.embedded.pages import Pages
from sagellm_ir.runtime.engines.embedded.tokenizer import ModelTokenizer
from sagellm_ir.runtime.engines.embedded.weights import WeightSource, tensor_shapes
from sagellm_ir.target import ModelSpec

__all__ = ["Batch", "CausalLM"]


@frozen
class Batch:
    """The rows of one forward, with everything that all layers share worked out."""

    ids: Tensor
    """(tokens,) token ids."""
    positions: Tensor
    """(tokens,)"""
    slots: Tensor
    """(tokens,) where each token's KV goes in the pool."""
    attend: Attend
    """Attention of these rows in any layer; their KV is in its pages."""
    last: Tensor
    """Indexes of the tokens whose logits are wanted; may be empty."""


@frozen
class _Layer:
    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def _layer(config: ModelConfig, take: Callable[[str], Tensor], prefix: str) -> _Layer:
    """A layer's weights, q, k and v as one product."""
    attention = prefix + "self_attn."
    return _Layer(
        take(prefix + "input_layernorm.weight"),
        ops.pack(torch.cat([take(f"{attention}{part}_proj.weight") for part in "qkv"])),
        torch.cat([take(f"{attention}{part}_proj.bias") for part in "qkv"])
        if config.qkv_bias
        else None,
        ops.pack(take(attention + "o_proj.weight")),
        take(prefix + "post_attention_layernorm.weight"),
        ops.pack(take(prefix + "mlp.gate_proj.weight")),
        ops.pack(take(prefix + "mlp.up_proj.weight")),
        ops.pack(take(prefix + "mlp.down_proj.weight")),
    )


class CausalLM:
    """A model's weights on a device, ready to run; with its tokenizer, if it has one."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: ModelTokenizer | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.tokenizer = tokenizer
        shapes = tensor_shapes(config)

        def take(name: str) -> Tensor:
            return weights.get(name, shapes[name]).to(self.device, dtype).contiguous()

        self._embedding = take("model.embed_tokens.weight")
        self._layers = [_layer(config, take, f"model.layers.{i}.") for i in range(config.layers)]
        self._norm = take("model.norm.weight")
        self._head = ops.pack(self._embedding if config.tied else take("lm_head.weight"))
        self._frequencies = torch.tensor(config.rope_frequencies(), device=self.device)

    @property
    def dtype_name(self) -> str:
        """The type of weights and activations, by its torch name."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def spec(self) -> ModelSpec:
        """The shape as targets describe it."""
        return self.config.spec(self.dtype.itemsize)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: Sequence[Pages]) -> Tensor:
        """Run a batch: its KV goes to the cache.

        Args:
            batch: the rows.
            cache: the pages of each layer, see `KVPool.layers`.

        Returns:
            (len(batch.last), vocab) logits in float32.
        """
        angles = batch.positions[:, None, None] * self._frequencies
        turn = torch.polar(torch.ones_like(angles), angles)
        x = F.embedding(batch.ids, self._embedding)
        for layer, pages in zip(self._layers[:-1], cache[:-1], strict=True):
            x = self._mlp(
                layer, ops.linear_add(self._attention(layer, x, turn, pages, batch), layer.out, x)
            )
        # Of the last layer only the KV of all rows is needed, and the result of a few.
        layer = self._layers[-1]
        seen = self._attention(layer, x, turn, cache[-1], batch)[batch.last]
        if not len(seen):
            return x.new_empty(0, self.config.vocab, dtype=torch.float32)
        x = self._mlp(layer, ops.linear_add(seen, layer.out, x[batch.last]))
        return ops.linear(self._normed(x, self._norm), self._head).float()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.config.hidden,), weight, self.config.norm_eps)

    def _attention(
        self, layer: _Layer, x: Tensor, turn: Tensor, pages: Pages, batch: Batch
    ) -> Tensor:
        """(tokens, heads * head_dim), before the output projection."""
        heads, kv_heads = self.config.heads, self.config.kv_heads
        qkv = ops.linear(self._normed(x, layer.attention_norm), layer.qkv, layer.qkv_bias)
        qkv = qkv.view(len(x), heads + 2 * kv_heads, self.config.head_dim)
        turned = ops.rotate(qkv[:, : heads + kv_heads], turn)
        query, key = turned[:, :heads], turned[:, heads:]
        key, value = pages.write(batch.slots, key, qkv[:, heads + kv_heads :])
        return batch.attend(query, key, value, pages)

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        inner = self._normed(x, layer.mlp_norm)
        gate = ops.linear_silu(inner, layer.gate)
        return ops.linear_add(ops.linear_mul(inner, layer.up, gate), layer.down, x)
