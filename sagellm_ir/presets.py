"""`load_target`: YAML -> `Target`, checked field by field.

A file has the fields of `Target`, with three shorthands: `model` may be the name of a model preset,
`workers` may be a number, and `tiers` is a mapping from names to tiers. A tier's size is one of

- `blocks`: KV blocks on each worker;
- `bytes`: bytes for KV on each worker, all its ranks together;
- `memory`: bytes of one rank, for its share of the weights and of the KV.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from attrs import evolve, field, fields, frozen, validators
from cattrs import BaseValidationError, Converter, ForbiddenExtraKeysError

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.nodes import Location
from sagellm_ir.target import DEVICE, ModelSpec, Target, Tier

__all__ = ["load_model", "load_target", "model_names", "target_names"]

_MOST_BYTES = 1 << 20
_PRESET = re.compile(r"\w[\w.\-]*")
_SIZES = ("blocks", "bytes", "memory")

T = TypeVar("T")
Where = tuple[str | int, ...]


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
    file = _File(_preset("models", name))
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
    file = _File(_preset("targets", text) if is_name else Path(name_or_path))
    file.forget(overrides)
    values = _merge(_expand(file, file.values), _expand(file, overrides))
    tiers = values.pop("tiers", None)
    target = file.structure(values, Target, ())
    if tiers is not None:
        target = evolve(target, tiers=_tiers(file, tiers, target))
    _check(file, target)
    return target


def _config() -> Path:
    """The folder `config`: in the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "config"
    return installed if installed.is_dir() else package.parent / "config"


def _names(kind: str) -> list[str]:
    return sorted(path.stem for path in (_config() / kind).glob("*.yaml"))


def _preset(kind: str, name: str) -> Path:
    if name not in _names(kind):
        singular = kind.removesuffix("s")
        message = f"there is no {singular} preset {name!r}"
        raise SageIRError(Diagnostic(message, help=suggest(name, _names(kind))))
    return _config() / kind / f"{name}.yaml"


class _File:
    """A YAML file: its mapping, and the line each field is on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Where, Location] = {}
        try:
            with path.open("rb") as stream:
                data = stream.read(_MOST_BYTES + 1)
        except OSError as error:
            reason = error.strerror or str(error)
            raise SageIRError(Diagnostic(f"cannot read {path}: {reason}")) from error
        if len(data) > _MOST_BYTES:
            raise SageIRError(Diagnostic(f"{path} is larger than {_MOST_BYTES} bytes"))
        try:
            tree = yaml.compose(data, yaml.SafeLoader)
            self._index(tree, ())
            self.values = yaml.safe_load(data)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            loc = Location(str(path), mark.line + 1, mark.column + 1) if mark else None
            reason = getattr(error, "problem", None) or str(error)
            raise SageIRError(Diagnostic(f"{path} is not YAML: {reason}", loc)) from error
        if not isinstance(self.values, dict) or not all(isinstance(k, str) for k in self.values):
            raise SageIRError(Diagnostic(f"{path}: expected a mapping from fields to values"))

    def _index(self, node: yaml.Node | None, where: Where) -> None:
        """Notes where every field is, and refuses a field that is given twice."""
        if node is None:
            return
        mark = node.start_mark
        self.lines[where] = Location(str(self.path), mark.line + 1, mark.column + 1)
        if isinstance(node, yaml.SequenceNode):
            for at, item in enumerate(node.value):
                self._index(item, (*where, at))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*where, str(key.value))
                if inner in self.lines:
                    self.fail(inner, "this field is given twice")
                self._index(value, inner)

    def diagnostic(
        self, where: Where, message: str, help_: str = "", missing: bool = False
    ) -> Diagnostic:
        """Something is wrong with the field at `where`, or it is missing there."""
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
        loc = self.lines.get(where) or (self.lines.get(where[:-1]) if missing else None)
        text = f"{name[1:]}: {message}" if name else message
        return Diagnostic(text if loc else f"{self.path.stem}: {text}", loc, help=help_)

    def forget(self, overrides: Mapping[str, Any], where: Where = ()) -> None:
        """Overridden fields are not what the file says, so no message may point there."""
        for name, value in overrides.items():
            self.lines.pop((*where, name), None)
            if isinstance(value, Mapping):
                self.forget(value, (*where, name))

    def fail(self, where: Where, message: str, help_: str = "") -> NoReturn:
        """Raises the diagnostic."""
        raise SageIRError(self.diagnostic(where, message, help_))

    def structure(self, values: Any, cls: type[T], where: Where) -> T:
        """`values` as a `cls`; every wrong field is one diagnostic."""
        if not isinstance(values, Mapping):
            self.fail(where, f"expected a mapping, got {values!r}")
        try:
            return _CONVERTER.structure(values, cls)
        except BaseValidationError as error:
            raise SageIRError(*self._problems(error, where)) from error

    def _problems(self, error: BaseValidationError, where: Where) -> Iterator[Diagnostic]:
        for inner in error.exceptions:
            notes = getattr(inner, "__notes__", ())
            steps = [getattr(note, "name", getattr(note, "index", None)) for note in notes]
            place = (*where, *(step for step in steps if step is not None))
            if isinstance(inner, ForbiddenExtraKeysError):
                known = [attribute.name for attribute in fields(inner.cl)]
                for name in sorted(map(str, inner.extra_fields)):
                    yield self.diagnostic((*place, name), "unknown field", suggest(name, known))
            elif isinstance(inner, BaseValidationError):
                yield from self._problems(inner, place)
            elif isinstance(inner, KeyError):
                yield self.diagnostic(place, "this field is missing", missing=True)
            else:
                # A validator of attrs names the field at the start: "'tp' must be > 0: 0".
                message = str(inner.args[0])
                if named := re.match(r"'(\w+)' ", message):
                    place, message = (*place, named[1]), message[named.end() :]
                yield self.diagnostic(place, message)


def _integer(value: Any, _: type) -> int:
    """A whole number; YAML writes large ones as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def _number(value: Any, _: type) -> float:
    """A finite number; YAML 1.1 takes 1e9 (without `.` and sign) for a text."""
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ValueError(f"expected a number, got {value!r}")
    return number


def _text(value: Any, _: type) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a text, got {value!r}")
    return value


def _boolean(value: Any, _: type) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


def _converter() -> Converter:
    """Strict: no unknown fields, no silent conversions."""
    converter = Converter(forbid_extra_keys=True)
    for cls, hook in ((int, _integer), (float, _number), (str, _text), (bool, _boolean)):
        converter.register_structure_hook(cls, hook)
    return converter


_CONVERTER = _converter()


def _expand(file: _File, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with their shorthands written out."""
    expanded = dict(values)
    if isinstance(model := expanded.get("model"), str):
        if model not in model_names():
            file.fail(
                ("model",), f"there is no model preset {model!r}", suggest(model, model_names())
            )
        expanded["model"] = _File(_preset("models", model)).values
    workers = expanded.get("workers")
    if type(workers) is int:
        expanded["workers"] = [{"name": f"w{number}"} for number in range(workers)]
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


def _tiers(file: _File, tiers: Any, target: Target) -> tuple[Tier, ...]:
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


def _blocks(file: _File, where: Where, spec: _TierSize, target: Target) -> int:
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


def _check(file: _File, target: Target) -> None:
    """What no single field shows."""
    if target.tier(DEVICE) is None:
        file.fail(("tiers",), f"there is no tier {DEVICE!r}, the one attention reads from")
    names: Sequence[str] = [worker.name for worker in target.workers]
    if not names:
        file.fail(("workers",), "expected at least one worker")
    if len({*names}) < len(names):
        file.fail(("workers",), "two workers have the same name")
