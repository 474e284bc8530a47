"""`measure_profile`: scales for quantised KV, from the KV of prompts."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from sagellm_ir.runtime.engines.embedded.attention import Part, paged_attention
from sagellm_ir.runtime.engines.embedded.model import Batch, CausalLM
from sagellm_ir.runtime.engines.embedded.pages import Pages
from sagellm_ir.runtime.engines.embedded.pool import KVPool
from sagellm_ir.runtime.kv_runtime.codec import CODECS
from sagellm_ir.runtime.protocols import KVSchemaConfig, QuantizationProfile

__all__ = ["forward_all", "measure_profile"]


def forward_all(model: CausalLM, pages: Sequence[Pages], tokens: Sequence[int]) -> torch.Tensor:
    """The (tokens, vocab) logits after each token of one prompt, whose KV goes to slots 0, 1, ..."""
    index = torch.arange(len(tokens), device=model.device)
    whole = slice(0, len(tokens))
    part = Part(whole, fresh=whole, causal=True, first=True)
    attend = partial(paged_attention, parts=(part,))
    ids = torch.tensor(tokens, device=model.device)
    return model.forward(Batch(ids, index, index, attend, index), pages)


def measure_profile(
    model: CausalLM, prompts: Iterable[Sequence[int]], dtype: str
) -> QuantizationProfile:
    """A scale for each layer, KV head, and K or V: the largest element of any prompt just fits.

    Args:
        prompts: token ids, at least one.
        dtype: of the codes.
    """
    largest = torch.zeros(model.config.layers, 2, model.config.kv_heads, device=model.device)
    schema = KVSchemaConfig().schema(model.spec, 1, model.dtype_name)
    for tokens in prompts:
        pool = KVPool(schema, {"device": len(tokens)}, model.dtype, model.device)
        forward_all(model, pool.layers, tokens)
        every = torch.arange(len(tokens), device=model.device)[None]
        for layer, pages in enumerate(pool.layers):
            found = pages.take(every)[:, 0].float().abs().amax((-2, -1))
            largest[layer] = torch.maximum(largest[layer], found)
    keys, values = (largest / CODECS[dtype].largest).unbind(1)
    return QuantizationProfile(
        dtype,
        "head",
        tuple(map(tuple, keys.tolist())),
        tuple(map(tuple, values.tolist())),
        model.config.name,
    )
