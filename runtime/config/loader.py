"""`load_config`: a YAML file and the environment over it -> `SageConfig`, and where each value is from.

A variable is named `SAGELLM_<SECTION>__<FIELD>`: `SAGELLM_SERVER__HOST`, and with one more `__` for a
field of a field, `SAGELLM_ACCEL__GATE__LAUNCH`. Its text is the field's YAML; that of a text field is
taken as it is, and a list of texts may be written with commas. An empty variable is not set.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from attrs import Attribute, fields, frozen, has

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.located_yaml import LocatedYAML, Where, yaml_value
from sagellm_ir.presets import config_folder
from sagellm_ir.runtime.config.sections import SageConfig
from sagellm_ir.runtime.ports import ports

__all__ = ["FILE_VARIABLE", "PREFIX", "Configuration", "load_config", "read_config"]

PREFIX = "SAGELLM_"
FILE_VARIABLE = "SAGELLM_CONFIG"
"""Names the file to read when the caller names none."""
_BETWEEN = "__"


@frozen
class Configuration:
    """A configuration, and where its values are from."""

    config: SageConfig
    origins: Mapping[Where, str]
    """By path: `file:line:column`, `environment variable NAME`; paths that are not here are defaults."""

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Every value as (dotted name, value, origin); secrets are masked."""
        for where, attribute, value in _leaves(self.config, ()):
            shown = "***" if value and attribute.metadata.get("secret") else value
            yield ".".join(map(str, where)), shown, self._origin(where, attribute)

    def _origin(self, where: Where, attribute: "Attribute[Any]") -> str:
        default = "default"
        if attribute.metadata.get("from_ports"):
            default = f"default, from the ports of {ports().origin}"
        return self.origins.get(where, default)


def load_config(path: str | Path | None = None, env: Mapping[str, str] | None = None) -> SageConfig:
    """The configuration (see `read_config`)."""
    return read_config(path, env).config


def read_config(
    path: str | Path | None = None, env: Mapping[str, str] | None = None
) -> Configuration:
    """The configuration with its origins.

    Args:
        path: the file; None: the one that `SAGELLM_CONFIG` names, else the `sage_llm.yaml` that
            comes with the package.
        env: the environment; None: the process's.

    Raises:
        SageIRError: the file cannot be read, or a field of it or a variable is unknown, or of the
            wrong type or value: one diagnostic each, with its line or its variable.
    """
    env = os.environ if env is None else env
    file = LocatedYAML(Path(path or env.get(FILE_VARIABLE) or config_folder() / "sage_llm.yaml"))
    # A section whose fields are all commented out reads as null.
    values = {name: {} if value is None else value for name, value in file.values.items()}
    origins = {where: str(loc) for where, loc in file.lines.items() if loc}
    problems: list[Diagnostic] = []
    for name in sorted(env):
        if name.startswith(PREFIX) and _BETWEEN in name and env[name]:
            try:
                where, value = _override(name, env[name])
            except ValueError as error:
                problems.append(Diagnostic(f"environment variable {name}: {error}"))
                continue
            _put(values, where, value)
            file.override(where, f"environment variable {name}")
            origins[where] = f"environment variable {name}"
    if problems:
        raise SageIRError(*problems)
    return Configuration(file.structure(values, SageConfig, ()), origins)


def _override(name: str, text: str) -> tuple[Where, Any]:
    """The path that a variable's name means, and its value; `ValueError` when there is none."""
    where: list[str] = []
    hint: Any = SageConfig
    for word in name.removeprefix(PREFIX).lower().split(_BETWEEN):
        hints = get_type_hints(hint) if has(hint) else {}
        if word not in hints:
            place = ".".join(where) or "the configuration"
            raise ValueError(f"{place} has no field {word!r}; {suggest(word, hints)}")
        where.append(word)
        hint = hints[word]
    if has(hint):
        raise ValueError(f"{'.'.join(where)} has fields: set them one by one, {name}__<FIELD>")
    return tuple(where), _parse(hint, text)


def _parse(hint: Any, text: str) -> Any:
    choices = get_args(hint) or (hint,)
    if str in choices and not text.startswith("["):
        return text.split(",") if Ellipsis in choices else text
    try:
        return yaml_value(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"its text is not YAML: {reason}") from None


def _put(values: dict[str, Any], where: Where, value: Any) -> None:
    """Set a value in nested mappings. Where the file has no mapping, it is reported instead."""
    for key in where[:-1]:
        inner = values.get(str(key), {})
        if not isinstance(inner, Mapping):
            return
        values[str(key)] = inner = dict(inner)
        values = inner
    values[str(where[-1])] = value


def _leaves(value: Any, where: Where) -> Iterator[tuple[Where, "Attribute[Any]", Any]]:
    for attribute in fields(type(value)):
        inner = getattr(value, attribute.name)
        here = (*where, attribute.name)
        if has(type(inner)):
            yield from _leaves(inner, here)
        else:
            yield here, attribute, inner
