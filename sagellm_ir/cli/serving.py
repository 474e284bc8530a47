"""What `llm serve` and `llm engine start` share: their options, and serving in this process."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from attrs import evolve

from sagellm_ir.cli import shared
from sagellm_ir.diagnostics import Diagnostic, SageIRError

if TYPE_CHECKING:
    from sagellm_ir.runtime.config import SageConfig

__all__ = [
    "Backend",
    "ConfigFile",
    "EngineId",
    "Gateway",
    "Host",
    "InstanceType",
    "KVSchema",
    "PipelineText",
    "Port",
    "choose",
    "serve_here",
]

EngineId = typer.Option("--engine-id", metavar="ID", help="Its name at the gateway.")
Backend = typer.Option("--backend", metavar="KIND", help="The engine that runs it: `backend list`.")
KVSchema = typer.Option("--kv-schema", metavar="preset=NAME", help="How KV is stored.")
PipelineText = typer.Option("--pipeline", "-p", metavar="TEXT", help="Passes: O0 to O3, or a list.")
Host = typer.Option("--host", metavar="ADDRESS", help="Where to listen.")
Port = typer.Option("--port", min=0, max=65535, help="0: any free one.")
InstanceType = typer.Option(
    "--instance-type", metavar="TYPE", help="general, prefilling or decoding."
)
Gateway = typer.Option("--gateway", metavar="URL", help="Register there; it must answer.")
ConfigFile = typer.Option("--config", metavar="FILE", help="The configuration: see `config show`.")


def choose(
    file: Path | None, *, kv_schema: str | None, **sections: Mapping[str, Any]
) -> "SageConfig":
    """The configuration, with what the command line says over it.

    Raises:
        SageIRError: a value is wrong.
    """
    from sagellm_ir.runtime.config import load_config
    from sagellm_ir.runtime.engines import find_backend
    from sagellm_ir.runtime.protocols import KVSchemaConfig

    config = load_config(file)
    try:
        for name, given in sections.items():
            said = {key: value for key, value in given.items() if value is not None}
            config = evolve(config, **{name: evolve(getattr(config, name), **said)})
    except ValueError as error:
        raise SageIRError(Diagnostic(str(error))) from None
    if kv_schema is not None:
        config = evolve(config, kv_schema=KVSchemaConfig.parse(kv_schema))
    find_backend(config.engine.backend)
    return config


def serve_here(
    config: "SageConfig", gateway: str | None, *, patient: bool, file: Path | None = None
) -> None:
    """Serve in this process, and say where. `file`: what the configuration was read from."""
    from sagellm_ir.runtime.config import FILE_VARIABLE

    if file is not None:
        # An engine's loader and its workers read the configuration themselves.
        os.environ[FILE_VARIABLE] = str(file.resolve())
    from sagellm_ir.runtime.control_plane.processes import EngineProcess, Engines
    from sagellm_ir.runtime.control_plane.serving import serve_engine

    engines, chosen = Engines(), config.engine
    process = EngineProcess(chosen.id, os.getpid(), chosen.backend, chosen.model, gateway=gateway)

    def started(host: str, port: int) -> None:
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        engines.write(evolve(process, url=url))
        shared.note(f"{chosen.model} is served at {url}/v1 by engine {chosen.id!r}")

    with engines.claim(chosen.id):
        engines.write(process)
        with shared.working(f"loading {chosen.model}"):
            serve_engine(config, gateway=gateway, patient=patient, started=started)
