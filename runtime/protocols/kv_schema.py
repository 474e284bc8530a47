"""`KVCacheSchema`: how a model's KV lies in pages; `KVSchemaConfig`: how a user asks for one."""

from attrs import evolve, field, frozen, validators

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.located_yaml import one_of
from sagellm_ir.target import ModelSpec

__all__ = [
    "AUTO",
    "KV_DTYPES",
    "PRESETS",
    "SCALES",
    "KVCacheSchema",
    "KVSchemaConfig",
    "kv_dtype_of",
]

KV_DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}
"""Types a KV element can be stored in, with their bytes."""
_TORCH_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
QUANTISED = ("fp8_e4m3", "fp8_e5m2", "int8")
SCALES = ("none", "token_head", "block")
"""What shares one scale: nothing has any; one token's K (or V) of one head; one block's of one head."""
SCALE_BYTES = 4
"""A scale is a float32."""
AUTO = "auto"
PRESETS = {"bf16": "bf16", "fp8": "fp8_e4m3", "int8": "int8"}
"""What `preset=` may name, and the dtype it means."""


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
    value of each head; `block`, each block's keys and values of each head; `none`."""

    def __attrs_post_init__(self) -> None:
        if (self.dtype == "int8") and self.scales == "none":
            raise ValueError("'scales' an int8 cache needs scales: token_head or block")
        if self.dtype not in QUANTISED and self.scales != "none":
            raise ValueError(f"'scales' a {self.dtype} cache has none; got {self.scales!r}")

    @classmethod
    def of(cls, model: ModelSpec, block_size: int, dtype: str) -> "KVCacheSchema":
        """The schema of a model's cache; quantised ones have a scale a token and head."""
        scales = "token_head" if dtype in QUANTISED else "none"
        return cls(model.layers, model.kv_heads, model.head_dim, block_size, dtype, scales)

    @property
    def quantised(self) -> bool:
        """Whether elements are stored in eight bits."""
        return self.dtype in QUANTISED

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of all layers, and their scales."""
        heads = 2 * self.layers * self.kv_heads
        scales = {"none": 0, "token_head": self.block_size, "block": 1}[self.scales]
        elements = self.block_size * self.head_dim * KV_DTYPES[self.dtype]
        return heads * (elements + scales * SCALE_BYTES)

    @property
    def token_bytes(self) -> float:
        """Bytes of one token; with a scale for each block, on average."""
        return self.block_bytes / self.block_size


@frozen
class KVSchemaConfig:
    """How KV is stored: the section `kv_schema` of `sage_llm.yaml`, and `--kv-schema`."""

    preset: str = field(default=AUTO, validator=one_of((AUTO, *PRESETS)))
    """`auto`: in the model's own type. `bf16`; `fp8` (e4m3) and `int8`, with a scale a token and
    head."""
    dtype: str | None = field(default=None, validator=validators.optional(one_of(KV_DTYPES)))
    """A type by its own name, instead of a preset."""

    def __attrs_post_init__(self) -> None:
        if self.dtype is not None and self.preset != AUTO:
            raise ValueError("'dtype' names a type, and so does preset: give one")

    @classmethod
    def parse(cls, text: str) -> "KVSchemaConfig":
        """`preset=fp8`, or `dtype=fp8_e5m2`.

        Raises:
            SageIRError: anything else.
        """
        key, separator, value = text.partition("=")
        known = ("preset", "dtype")
        if not separator or key not in known:
            raise SageIRError(
                Diagnostic(
                    f"KV schema {text!r}: expected preset=NAME or dtype=NAME",
                    help=suggest(text if separator else f"preset={text}", _spellings()),
                )
            )
        try:
            return cls(**{key: value})
        except ValueError as error:
            raise SageIRError(Diagnostic(f"KV schema {text!r}: {error}")) from None

    def resolve(self, model_dtype: str) -> str:
        """The type KV is stored in.

        Args:
            model_dtype: the model's own, by its torch name.

        Raises:
            SageIRError: `auto`, and KV cannot be stored in the model's type.
        """
        return self.dtype or PRESETS.get(self.preset) or kv_dtype_of(model_dtype)

    def fit(self, model: ModelSpec, model_dtype: str) -> ModelSpec:
        """The model's shape with the size its KV then has: what targets are made with."""
        stored = self.resolve(model_dtype)
        if stored == kv_dtype_of(model_dtype):
            return evolve(model, kv_head_bytes=0)
        schema = KVCacheSchema.of(model, 1, stored)
        return evolve(
            model, kv_head_bytes=schema.block_bytes // (2 * model.layers * model.kv_heads)
        )


def kv_dtype_of(model_dtype: str) -> str:
    """The name in `KV_DTYPES` of a type with this torch name.

    Raises:
        SageIRError: it is none of them.
    """
    if model_dtype not in _TORCH_NAMES:
        message = f"KV cannot be stored as {model_dtype!r}"
        raise SageIRError(Diagnostic(message, help=suggest(model_dtype, _TORCH_NAMES)))
    return _TORCH_NAMES[model_dtype]


def _spellings() -> list[str]:
    return [f"preset={name}" for name in PRESETS] + [f"dtype={name}" for name in KV_DTYPES]
