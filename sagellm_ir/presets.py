"""`load_target`: YAML -> `Target`, checked field by field.

A file has the fields of `Target`, with three shorthands: `model` may be the name of a model preset,
`workers` may be a number, and `tiers` is a mapping from names to tiers. A tier's size is one of

- `blocks`: KV blocks on each worker;
- `bytes`: bytes for KV on each worker, all its ranks together;
- `memory`: bytes of one rank, for its share of the weights and of the KV.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen, validators

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.located_yaml import LocatedYAML, Where
from sagellm_ir.target import DEVICE, ModelSpec, Target, Tier

__all__ = ["config_folder", "load_model", "load_target", "model_names", "target_names"]

_PRESET = re.compile(r"\w[\w.\-]*")
_MOST_WORKERS = 1024
_SIZES = ("blocks", "bytes", "memory")


@frozen
class _TierSize:
    """A tier of a file."""

    blocks: int | None = field(default=None, validator=validators.optional(validators.ge(0)))
    bytes: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    memory: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    bandwidth: float = field(default=1.0e10, validator=validators.gt(0))
    latency: float = field(default=0.0, validator=validators.ge(0))


def target_names() -> list[str]:
    """The target presets."""
    return _names("targets")


def model_names() -> list[str]:
    """The model presets."""
    return _names("models")


def load_model(name: str) -> ModelSpec:
    """The model preset `name`.

    Raises:
        SageIRError: there is no such preset, or its file is wrong.
    """
    file = LocatedYAML(_preset("models", name))
    return file.structure(file.values, ModelSpec, ())


def load_target(name_or_path: str | Path, **overrides: Any) -> Target:
    """The target preset of that name, or the one in that YAML file.

    Overrides are fields of the file and win over it; mappings are merged, so
    `load_target("h200", tp=2, tiers={"host": {"blocks": 0}})` keeps the host tier's bandwidth.
    Sizes in bytes are turned into blocks afterwards.

    Raises:
        SageIRError: no such preset or file; a field is unknown, missing, of the wrong type or not
            positive; the weights do not fit. Each diagnostic names file, line and field.
    """
    text = str(name_or_path)
    is_name = _PRESET.fullmatch(text) and not text.endswith((".yaml", ".yml"))
    file = LocatedYAML(_preset("targets", text) if is_name else Path(name_or_path))
    file.forget(overrides)
    values = _merge(_expand(file, file.values), _expand(file, overrides))
    tiers = values.pop("tiers", None)
    target = file.structure(values, Target, ())
    if tiers is not None:
        target = evolve(target, tiers=_tiers(file, tiers, target))
    _check(file, target)
    return target


def config_folder() -> Path:
    """The folder `config`: in the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "config"
    return installed if installed.is_dir() else package.parent / "config"


def _names(kind: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / kind).glob("*.yaml"))


def _preset(kind: str, name: str) -> Path:
    if name not in _names(kind):
        singular = kind.removesuffix("s")
        message = f"there is no {singular} preset {name!r}"
        help_ = suggest(name, _names(kind))
        if Path(name).exists():
            help_ += "; a file is named by its path: end it with .yaml, or begin it with ./"
        raise SageIRError(Diagnostic(message, help=help_))
    return config_folder() / kind / f"{name}.yaml"


def _expand(file: LocatedYAML, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with their shorthands written out."""
    expanded = dict(values)
    if isinstance(model := expanded.get("model"), str):
        if model not in model_names():
            file.fail(
                ("model",), f"there is no model preset {model!r}", suggest(model, model_names())
            )
        expanded["model"] = LocatedYAML(_preset("models", model)).values
    workers = expanded.get("workers")
    if type(workers) is int and workers <= _MOST_WORKERS:
        expanded["workers"] = [{"name": f"w{number}"} for number in range(workers)]
    elif "workers" in expanded and not isinstance(workers, list):
        file.fail(
            ("workers",), f"expected a list, or a number up to {_MOST_WORKERS}, got {workers!r}"
        )
    return expanded


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings in both are merged. One way to give a size replaces the others."""
    merged = dict(base)
    if not over.keys().isdisjoint(_SIZES):
        merged = {key: value for key, value in merged.items() if key not in _SIZES}
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _tiers(file: LocatedYAML, tiers: Any, target: Target) -> tuple[Tier, ...]:
    """The tiers of a file, with their sizes in blocks."""
    if not isinstance(tiers, Mapping):
        file.fail(("tiers",), f"expected a mapping from names to tiers, got {tiers!r}")
    made = []
    for name, values in tiers.items():
        where = ("tiers", str(name))
        spec = file.structure(values, _TierSize, where)
        blocks = _blocks(file, where, spec, target)
        made.append(Tier(str(name), blocks, spec.bandwidth, spec.latency))
    return tuple(made)


def _blocks(file: LocatedYAML, where: Where, spec: _TierSize, target: Target) -> int:
    """The size of a tier in blocks."""
    given = [size for size in _SIZES if getattr(spec, size) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        file.fail(where, f"expected one of {', '.join(_SIZES)}, got {got}")
    if spec.blocks is not None:
        return spec.blocks
    free = spec.bytes
    if free is None:
        weights = _weight_bytes(target.model)
        free = (spec.memory or 0.0) * target.tp - weights
        if free < target.block_bytes:
            message = f"{weights / 1e9:.1f} GB of weights leave no room for a KV block"
            file.fail((*where, "memory"), message, "raise tp or memory, or take a smaller model")
    return int(free // target.block_bytes)


def _weight_bytes(model: ModelSpec) -> float:
    """Bytes of all weights; the embedding is counted even where it is tied to the head."""
    return float((model.layer_params + 2 * model.head_params) * model.dtype_bytes)


def _check(file: LocatedYAML, target: Target) -> None:
    """What no single field shows."""
    if target.tier(DEVICE) is None:
        file.fail(("tiers",), f"there is no tier {DEVICE!r}, the one attention reads from")
    names: Sequence[str] = [worker.name for worker in target.workers]
    if not names:
        file.fail(("workers",), "expected at least one worker")
    if len({*names}) < len(names):
        file.fail(("workers",), "two workers have the same name")
