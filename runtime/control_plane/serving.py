"""`serve_engine`: an engine as a configuration says, served over HTTP and attached to a gateway."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from attrs import fields

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.config import EngineConfig, SageConfig
from sagellm_ir.runtime.control_plane.attach import Attachment, EngineRecord
from sagellm_ir.runtime.control_plane.client import gateway_key
from sagellm_ir.runtime.control_plane.local import LocalMember
from sagellm_ir.runtime.engines import load_backend
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from sagellm_ir.runtime.server.main import serve

__all__ = ["serve_engine"]

EVERYWHERE = ("0.0.0.0", "::", "")
OPTIONS = ("dtype", "device", "target")
"""Fields of `EngineConfig` that loaders take."""


def serve_engine(
    config: SageConfig,
    *,
    gateway: str | None = None,
    patient: bool = False,
    started: Callable[[str, int], None] | None = None,
) -> None:
    """Load a model and serve it until a signal drains it.

    Args:
        config: which engine and model, where, and for whom.
        gateway: the URL of the gateway to register with.
        patient: whether that gateway may come later.
        started: called with host and port once requests can come.

    Raises:
        SageIRError: the model cannot be loaded, the address is taken, or the gateway refuses.
    """
    if gateway is not None and config.server.api_keys:
        raise SageIRError(
            Diagnostic(
                "an engine behind a gateway has no keys of its own: the gateway does not know them",
                help="unset server.api_keys, or do not attach",
            )
        )
    engine = make_engine(config)

    @asynccontextmanager
    async def joining(host: str, port: int) -> AsyncIterator[None]:
        assert gateway is not None
        attachment = Attachment(
            gateway,
            _record(config, engine, host, port),
            figures=LocalMember(engine).figures,
            interval=config.control_plane.heartbeat,
            api_key=gateway_key(),
        )
        await attachment.open(patient=patient)
        leaving.append(attachment)
        try:
            yield
        finally:
            await attachment.drain()

    leaving: list[Attachment] = []
    try:
        serve(
            engine,
            config.server,
            config.limits,
            joining=joining if gateway is not None else None,
            started=started,
        )
    finally:
        for attachment in leaving:
            attachment.deregister()


def make_engine(config: SageConfig) -> SageLLMEngine:
    """The engine of a configuration, with its model loaded; not started.

    Raises:
        SageIRError: see `load_backend`.
    """
    chosen = config.engine
    options: dict[str, Any] = {
        name: value
        for name in OPTIONS
        if (value := getattr(chosen, name)) != getattr(fields(EngineConfig), name).default
    }
    if config.kv_schema != type(config.kv_schema)():
        options["kv_schema"] = config.kv_schema
    loaded = load_backend(chosen.backend, chosen.model, **options)
    return SageLLMEngine(
        loaded,
        engine_id=chosen.id,
        pipeline=chosen.pipeline,
        max_waiting=config.limits.waiting,
    )


def _record(config: SageConfig, engine: SageLLMEngine, host: str, port: int) -> EngineRecord:
    schema = {"preset": config.kv_schema.preset, "dtype": config.kv_schema.dtype}
    member = LocalMember(engine)
    metadata = member.metadata(config.control_plane.instance_type, schema)
    metadata["backend"] = config.engine.backend
    return EngineRecord(
        engine.engine_id, engine.model_name, _reachable(host), port, metadata=metadata
    )


def _reachable(host: str) -> str:
    """An address of this machine that others can use, for one that listens everywhere."""
    if host not in EVERYWHERE:
        return host
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"
