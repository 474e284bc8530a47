"""`QuantizationProfile`: how KV is quantised, as one file that any engine can read."""

import math
from pathlib import Path

from attrs import asdict, field, frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.files import write_atomic
from sagellm_ir.located_yaml import one_of
from sagellm_ir.runtime.protocols.kv_schema import QUANTISED
from sagellm_ir.runtime.protocols.serial import from_json_file, to_json
from sagellm_ir.target import ModelSpec

__all__ = ["QuantizationProfile"]

_TENSORS = ("key_scales", "value_scales")
_MOST_BYTES = 64 << 20


@frozen
class QuantizationProfile:
    """How KV is quantised: `value = code * scale`, symmetric, round to nearest.

    Written as JSON (`*.json`), or as safetensors with the scales as float32 tensors and the other
    fields as metadata (`*.safetensors`). Nothing in it is code.
    """

    dtype: str = field(validator=one_of(QUANTISED))
    """Type of the codes: int8, fp8_e4m3 or fp8_e5m2."""
    scales: str = field(default="token_head", validator=one_of(("token_head", "block", "head")))
    """What shares one float32 scale: `token_head`, each token's key and value of each head;
    `block`, each block's keys and values of each head; both are computed when KV is written.
    `head`: all tokens of a head share those below."""
    key_scales: tuple[tuple[float, ...], ...] = ()
    """For `head`: by layer, the scale of each KV head's keys; else empty."""
    value_scales: tuple[tuple[float, ...], ...] = ()
    """As `key_scales`, of values."""
    model: str | None = None
    """The model whose KV the scales were measured on."""

    def __attrs_post_init__(self) -> None:
        rows = self.key_scales + self.value_scales
        if self.scales != "head":
            if rows:
                raise ValueError(f"'scales' of each {self.scales} are computed, not given")
            return
        if not rows or len(self.key_scales) != len(self.value_scales):
            raise ValueError("'key_scales' and value_scales: expected one row for each layer")
        if len({len(row) for row in rows}) > 1 or not rows[0]:
            raise ValueError("'key_scales' and value_scales: expected one scale for each KV head")
        if not all(scale > 0 and math.isfinite(scale) for row in rows for scale in row):
            raise ValueError("'key_scales' and value_scales: expected finite numbers above 0")

    def check(self, model: ModelSpec) -> None:
        """Raise `SageIRError` unless given scales are for a model of this shape."""
        if self.scales != "head":
            return
        found = (len(self.key_scales), len(self.key_scales[0]))
        if found != (model.layers, model.kv_heads):
            message = (
                f"the profile has scales for {found[0]} layers of {found[1]} KV heads, model "
                f"{model.name!r} has {model.layers} of {model.kv_heads}"
            )
            raise SageIRError(Diagnostic(message, help="measure the scales on this model"))

    def save(self, path: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            SageIRError: the file cannot be written, or the name ends in neither suffix.
        """
        _suffix(path)
        if path.suffix == ".json":
            write_atomic(path, to_json(self))
            return
        import numpy as np
        from safetensors.numpy import save

        tensors = {name: np.array(getattr(self, name), np.float32) for name in _TENSORS}
        plain = {name: value for name, value in asdict(self).items() if name not in _TENSORS}
        given = {name: value for name, value in plain.items() if value is not None}
        write_atomic(path, save(tensors, given))

    @classmethod
    def load(cls, path: Path) -> "QuantizationProfile":
        """Read it.

        Raises:
            SageIRError: the file cannot be read, or is no profile.
        """
        _suffix(path)
        if path.suffix == ".json":
            return from_json_file(cls, path)
        return _load_tensors(path)


def _load_tensors(path: Path) -> QuantizationProfile:
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise SageIRError(Diagnostic(f"{path} is larger than {_MOST_BYTES} bytes"))
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            keys, values = (
                tuple(tuple(map(float, row)) for row in file.get_tensor(name)) for name in _TENSORS
            )
        return QuantizationProfile(
            metadata["dtype"], metadata["scales"], keys, values, metadata.get("model")
        )
    except OSError as error:
        reason = error.strerror or str(error)
        raise SageIRError(Diagnostic(f"cannot read {path}: {reason}")) from None
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise SageIRError(Diagnostic(f"{path} is no quantisation profile: {error}")) from None


def _suffix(path: Path) -> None:
    if path.suffix not in (".json", ".safetensors"):
        message = f"{path}: a quantisation profile is a .json or .safetensors file"
        raise SageIRError(Diagnostic(message))
