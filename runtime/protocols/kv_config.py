"""`KVSchemaConfig`: how a user asks for KV to be stored."""

from pathlib import Path

from attrs import evolve, field, fields, frozen, validators

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.located_yaml import one_of
from sagellm_ir.runtime.protocols.kv_schema import (
    KV_DTYPES,
    QUANTISED,
    KVCacheSchema,
    kv_dtype_of,
)
from sagellm_ir.runtime.protocols.quantization import QuantizationProfile
from sagellm_ir.target import ModelSpec

__all__ = ["PRESETS", "KVSchemaConfig"]

AUTO = "auto"
PRESETS = {"bf16": "bf16", "fp8": "fp8_e4m3", "int8": "int8"}
"""What `preset=` may name, and the dtype it means."""


@frozen
class KVSchemaConfig:
    """How KV is stored: the section `kv_schema` of `sage_llm.yaml`, and `--kv-schema`.

    At most one field may be given.
    """

    preset: str = field(default=AUTO, validator=one_of((AUTO, *PRESETS)))
    """`auto`: in the model's own type. `bf16`; `fp8` (e4m3) and `int8`, with a scale for each token
    and head."""
    dtype: str | None = field(default=None, validator=validators.optional(one_of(KV_DTYPES)))
    """A type by its own name, instead of a preset."""
    profile: str | None = None
    """The file of a `QuantizationProfile`, instead of a preset."""

    def __attrs_post_init__(self) -> None:
        given = [self.preset if self.preset != AUTO else None, self.dtype, self.profile]
        if sum(value is not None for value in given) > 1:
            name = "profile" if self.profile else "dtype"
            raise ValueError(f"'{name}' is one way to say how KV is stored: give one")

    @classmethod
    def parse(cls, text: str) -> "KVSchemaConfig":
        """`preset=fp8`, `dtype=fp8_e5m2` or `profile=FILE`.

        Raises:
            SageIRError: anything else.
        """
        key, separator, value = text.partition("=")
        known = [attribute.name for attribute in fields(cls)]
        if not separator or not value or key not in known:
            spellings = [f"preset={name}" for name in PRESETS]
            message = f"KV schema {text!r}: expected preset=NAME, dtype=NAME or profile=FILE"
            help_ = suggest(text if separator else f"preset={text}", spellings)
            raise SageIRError(Diagnostic(message, help=help_))
        try:
            return cls(**{key: value})
        except ValueError as error:
            raise SageIRError(Diagnostic(f"KV schema {text!r}: {error}")) from None

    def quantization(self, model_dtype: str) -> QuantizationProfile | None:
        """How KV is quantised; None when it is not. Reads the profile's file, if there is one.

        Args:
            model_dtype: the model's own type, by its torch name.

        Raises:
            SageIRError: the file cannot be read, or `auto` and KV cannot be stored in that type.
        """
        if self.profile is not None:
            return QuantizationProfile.load(Path(self.profile))
        dtype = self._named(model_dtype)
        return QuantizationProfile(dtype) if dtype in QUANTISED else None

    def resolve(self, model_dtype: str) -> str:
        """The type KV is stored in (see `quantization`)."""
        found = self.quantization(model_dtype)
        return found.dtype if found else self._named(model_dtype)

    def schema(self, model: ModelSpec, block_size: int, model_dtype: str) -> KVCacheSchema:
        """The schema of a model's cache (see `quantization`)."""
        found = self.quantization(model_dtype)
        if found is None:
            return KVCacheSchema.of(model, block_size, self._named(model_dtype))
        return KVCacheSchema.of(model, block_size, found.dtype, found.scales)

    def fit(self, model: ModelSpec, model_dtype: str) -> ModelSpec:
        """The model's shape with the size its KV then has: what targets are made with."""
        schema = self.schema(model, 1, model_dtype)
        if schema.dtype == kv_dtype_of(model_dtype):
            return evolve(model, kv_head_bytes=0)
        return evolve(
            model, kv_head_bytes=schema.block_bytes // (2 * model.layers * model.kv_heads)
        )

    def _named(self, model_dtype: str) -> str:
        return self.dtype or PRESETS.get(self.preset) or kv_dtype_of(model_dtype)
