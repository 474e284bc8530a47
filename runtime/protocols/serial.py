"""JSON of the types in `runtime/protocols`: every field is written, none is ignored when read."""

import base64
import json
from pathlib import Path
from typing import Any, TypeVar

from attrs import asdict

from sagellm_ir.located_yaml import LocatedYAML

__all__ = ["from_json", "from_json_file", "to_json"]

T = TypeVar("T")


def to_json(value: Any) -> str:
    """An attrs value as JSON; bytes are written in base64."""
    data = asdict(value, value_serializer=lambda _, __, item: _plain(item))
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def from_json(cls: type[T], text: str | bytes, filename: str = "<json>") -> T:
    """Reads what `to_json` wrote.

    Raises:
        SageIRError: it is no JSON, or a field is unknown, missing, or of the wrong type or value:
            one diagnostic each, with its line.
    """
    data = text.encode() if isinstance(text, str) else text
    file = LocatedYAML(Path(filename), data)
    return file.structure(file.values, cls, ())


def from_json_file(cls: type[T], path: Path) -> T:
    """Reads a file (see `from_json`)."""
    file = LocatedYAML(path)
    return file.structure(file.values, cls, ())


def _plain(item: Any) -> Any:
    return base64.b64encode(item).decode() if isinstance(item, bytes) else item
