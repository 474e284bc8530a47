"""`KVCacheSchema`: how a model's KV lies in blocks."""

from attrs import field, frozen, validators

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.located_yaml import one_of
from sagellm_ir.target import ModelSpec

__all__ = [
    "KV_DTYPES",
    "QUANTISED",
    "SCALES",
    "KVCacheSchema",
    "kv_dtype_of",
]

KV_DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}
"""Types a KV element can be stored in, with their bytes."""
_TORCH_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
QUANTISED = ("fp8_e4m3", "fp8_e5m2", "int8")
"""Those with eight bits."""
SCALES = ("none", "token_head", "block", "head")
"""What shares one scale; see `KVCacheSchema.scales`."""
SCALE_BYTES = 4
"""A scale is a float32."""


def _positive() -> int:
    """A size."""
    made: int = field(validator=validators.gt(0))
    return made


@frozen
class KVCacheSchema:
    """How the KV cache of one model is stored, in blocks of tokens."""

    layers: int = _positive()
    """Layers that keep KV."""
    kv_heads: int = _positive()
    """KV heads of a layer, over all tensor-parallel ranks: with grouped queries fewer than query
    heads."""
    head_dim: int = _positive()
    """Elements of one head's key, and of its value."""
    block_size: int = _positive()
    """Tokens of a block."""
    dtype: str = field(default="bf16", validator=one_of(KV_DTYPES))
    """Type of the stored elements: fp32, bf16, fp16, fp8_e4m3, fp8_e5m2 or int8."""
    scales: str = field(default="none", validator=one_of(SCALES))
    """What shares one float32 scale (`value = stored * scale`): `token_head`, each token's key and
    value of each head; `block`, each block's keys and values of each head; `head`, all tokens of a
    head, measured beforehand and kept outside the blocks; `none`."""

    def __attrs_post_init__(self) -> None:
        if (self.dtype == "int8") and self.scales == "none":
            raise ValueError("'scales' an int8 cache needs scales: token_head, block or head")
        if self.dtype not in QUANTISED and self.scales != "none":
            raise ValueError(f"'scales' a {self.dtype} cache has none; got {self.scales!r}")

    @classmethod
    def of(
        cls, model: ModelSpec, block_size: int, dtype: str, scales: str | None = None
    ) -> "KVCacheSchema":
        """The schema of a model's cache; quantised ones have, unless told, `token_head` scales."""
        if scales is None:
            scales = "token_head" if dtype in QUANTISED else "none"
        return cls(model.layers, model.kv_heads, model.head_dim, block_size, dtype, scales)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of all layers, and their scales."""
        heads = 2 * self.layers * self.kv_heads
        scales = {"token_head": self.block_size, "block": 1}.get(self.scales, 0)
        elements = self.block_size * self.head_dim * KV_DTYPES[self.dtype]
        return heads * (elements + scales * SCALE_BYTES)

    @property
    def token_bytes(self) -> float:
        """Bytes of one token; with a scale for each block, on average."""
        return self.block_bytes / self.block_size


def kv_dtype_of(model_dtype: str) -> str:
    """The name in `KV_DTYPES` of a type with this torch name.

    Raises:
        SageIRError: it is none of them.
    """
    if model_dtype not in _TORCH_NAMES:
        message = f"KV cannot be stored as {model_dtype!r}"
        raise SageIRError(Diagnostic(message, help=suggest(model_dtype, _TORCH_NAMES)))
    return _TORCH_NAMES[model_dtype]
