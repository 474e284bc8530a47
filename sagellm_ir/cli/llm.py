"""`llm ...`: serve a model, in the foreground; `llm engine ...`: engines in the background."""

from pathlib import Path
from typing import Annotated

import typer

from sagellm_ir.cli import engine, serving, shared
from sagellm_ir.cli.help import group

__all__ = ["app"]

app = group("llm", "Serve models: engines with an OpenAI API.", example="serve smollm2-135m")


app.add_typer(engine.app)


@shared.command(app, "serve", example="smollm2-135m --kv-schema preset=fp8")
def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A known name, a folder or a file."),
    ] = None,
    engine_id: Annotated[str | None, serving.EngineId] = None,
    backend: Annotated[str | None, serving.Backend] = None,
    kv_schema: Annotated[str | None, serving.KVSchema] = None,
    pipeline: Annotated[str | None, serving.PipelineText] = None,
    host: Annotated[str | None, serving.Host] = None,
    port: Annotated[int | None, serving.Port] = None,
    instance_type: Annotated[str | None, serving.InstanceType] = None,
    gateway: Annotated[str | None, serving.Gateway] = None,
    config: Annotated[Path | None, serving.ConfigFile] = None,
) -> None:
    """Serve a model here until Ctrl-C or SIGTERM; running requests finish first."""
    chosen = serving.choose(
        config,
        engine={"id": engine_id, "model": model, "backend": backend, "pipeline": pipeline},
        server={"host": host, "port": port},
        control_plane={"instance_type": instance_type},
        kv_schema=kv_schema,
    )
    from sagellm_ir.runtime.control_plane.client import gateway_url

    plane = chosen.control_plane
    wanted = gateway or plane.gateway or (gateway_url() if plane.attach else None)
    serving.serve_here(chosen, wanted, patient=gateway is None, file=config)
