"""The Control Plane's packages: optional, built for CPython 3.11 only, imported when they are used."""

import importlib.util
import sys

from sagellm_ir.diagnostics import Diagnostic, SageIRError

__all__ = ["have", "require"]


def have(module: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(module) is not None


def require(module: str, extra: str) -> None:
    """Check that a package is there.

    Raises:
        SageIRError: it is not; says how to get it.
    """
    if have(module):
        return
    help_ = f"pip install 'sagellm-ir[{extra}]'"
    if sys.version_info[:2] != (3, 11):
        help_ += " in CPython 3.11: the package is built for that version only"
    raise SageIRError(Diagnostic(f"{module} is not installed", help=help_))
