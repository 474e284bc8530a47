"""Every port of sagellm-ir, by the names of SAGE's `SagePorts`. No other file holds a port number.

The numbers are those of the SAGE that is installed (`isage`, else `isage-common`), so that all of a
machine's SAGE processes agree; without one, those of `BuiltinPorts`.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Protocol

from attrs import frozen

__all__ = [
    "BuiltinPorts",
    "PortSource",
    "PortTable",
    "edge_port",
    "embedding_port",
    "engine_port",
    "gateway_port",
    "ports",
    "recommended_llm_port",
    "serve_port",
]


class PortTable(Protocol):
    """What is used of a `SagePorts`."""

    @property
    def GATEWAY_DEFAULT(self) -> int:
        """The gateway, where clients come in."""
        ...

    @property
    def EDGE_DEFAULT(self) -> int:
        """The edge aggregator."""
        ...

    @property
    def SAGELLM_SERVE_PORT(self) -> int:
        """The server of a machine's first model."""
        ...

    @property
    def SAGELLM_ENGINE_PORT(self) -> int:
        """The engine behind it, where a gateway reaches it."""
        ...

    @property
    def EMBEDDING_DEFAULT(self) -> int:
        """The first embedding server."""
        ...

    def get_recommended_llm_port(self) -> int:
        """Where one model is served without a gateway."""
        ...


class BuiltinPorts:
    """The same names and numbers, for a machine without SAGE."""

    GATEWAY_DEFAULT = 8889
    EDGE_DEFAULT = 8899
    SAGELLM_SERVE_PORT = 8901
    SAGELLM_ENGINE_PORT = 8902
    LLM_DEFAULT = 8001
    EMBEDDING_DEFAULT = 8090

    @classmethod
    def get_recommended_llm_port(cls) -> int:
        """Windows does not always forward `LLM_DEFAULT` into its Linux (WSL)."""
        on_wsl = "microsoft" in platform.uname().release.lower()
        return cls.SAGELLM_SERVE_PORT if on_wsl else cls.LLM_DEFAULT


@frozen
class PortSource:
    """A table, and where it is from."""

    table: PortTable
    origin: str


_NAMES = tuple(name for name in vars(PortTable) if name.isupper())
_SOURCES = (
    ("isage", "sage.foundation"),
    ("isage-common", "sage.common.config.ports"),
)
_TOUCHED = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TORCH_DISTRIBUTED_DEBUG")
"""Importing `sage.common` sets these, which would tie collectives to the loopback interface."""


@cache
def ports() -> PortSource:
    """The table of this machine. Imports SAGE at the first call, if it is there."""
    for package, module in _SOURCES:
        try:
            with _environment_kept():
                table = import_module(module).SagePorts
        except (ImportError, AttributeError):
            continue
        if all(isinstance(getattr(table, name, None), int) for name in _NAMES):
            return PortSource(table, package)
    return PortSource(BuiltinPorts(), "built in")


@contextmanager
def _environment_kept() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _TOUCHED}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def gateway_port() -> int:
    """Where clients find the gateway: `GATEWAY_DEFAULT`."""
    return ports().table.GATEWAY_DEFAULT


def recommended_llm_port() -> int:
    """Where one model is served without a gateway: `get_recommended_llm_port()`."""
    return ports().table.get_recommended_llm_port()


def serve_port() -> int:
    """The server of a machine's first model: `SAGELLM_SERVE_PORT`."""
    return ports().table.SAGELLM_SERVE_PORT


def engine_port() -> int:
    """An engine that a gateway reaches: `SAGELLM_ENGINE_PORT`."""
    return ports().table.SAGELLM_ENGINE_PORT


def embedding_port() -> int:
    """The first embedding server: `EMBEDDING_DEFAULT`."""
    return ports().table.EMBEDDING_DEFAULT


def edge_port() -> int:
    """The edge aggregator: `EDGE_DEFAULT`."""
    return ports().table.EDGE_DEFAULT
