"""`llm ...`: serve a model, in the foreground; `llm engine ...`: engines in the background."""

from pathlib import Path
from typing import Annotated

import typer

from sagellm_ir.cli import engine, shared

__all__ = ["app"]

app = typer.Typer(
    name="llm",
    no_args_is_help=True,
    help="Serve models: engines with an OpenAI API.",
    epilog="Example: sage llm serve smollm2-135m",
)


@app.callback()
def _group() -> None:
    """Serve models: engines with an OpenAI API."""


app.add_typer(engine.app)


@shared.command(app, "serve", example="llm serve smollm2-135m --kv-schema preset=fp8")
def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A known name, a folder or a file."),
    ] = None,
    engine_id: Annotated[str | None, engine.EngineId] = None,
    backend: Annotated[str | None, engine.Backend] = None,
    kv_schema: Annotated[str | None, engine.KVSchema] = None,
    pipeline: Annotated[str | None, engine.PipelineText] = None,
    host: Annotated[str | None, engine.Host] = None,
    port: Annotated[int | None, engine.Port] = None,
    instance_type: Annotated[str | None, engine.InstanceType] = None,
    gateway: Annotated[str | None, engine.Gateway] = None,
    config: Annotated[Path | None, engine.ConfigFile] = None,
) -> None:
    """Serve a model here until Ctrl-C or SIGTERM; running requests finish first."""
    chosen = engine.choose(
        config,
        engine={"id": engine_id, "model": model, "backend": backend, "pipeline": pipeline},
        server={"host": host, "port": port},
        control_plane={"instance_type": instance_type},
        kv_schema=kv_schema,
    )
    from sagellm_ir.runtime.control_plane.client import gateway_url

    plane = chosen.control_plane
    wanted = gateway or plane.gateway or (gateway_url() if plane.attach else None)
    engine.run_here(chosen, wanted, patient=gateway is None, file=config)
