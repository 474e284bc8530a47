"""`llm engine ...`: start, list, look at and stop engines of this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer
from attrs import asdict

from sagellm_ir.cli import serving, shared
from sagellm_ir.cli.background import free_id, start_behind, words_of
from sagellm_ir.cli.help import flag, group
from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest

__all__ = ["app", "print_engines"]

app = group(
    "engine",
    "Engines in the background of this machine.",
    example="start smollm2-135m --engine-kind sagellm",
)

OURS = "sagellm"


@shared.command(app, "start", example="smollm2-135m --kv-schema preset=fp8")
def start(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A known name, a folder or a file.")
    ],
    engine_kind: Annotated[
        str, typer.Option("--engine-kind", metavar="KIND", help="Only sagellm can be started.")
    ] = OURS,
    engine_id: Annotated[str | None, serving.EngineId] = None,
    backend: Annotated[str | None, serving.Backend] = None,
    kv_schema: Annotated[str | None, serving.KVSchema] = None,
    pipeline: Annotated[str | None, serving.PipelineText] = None,
    host: Annotated[str | None, serving.Host] = None,
    port: Annotated[int, serving.Port] = 0,
    instance_type: Annotated[str | None, serving.InstanceType] = None,
    gateway: Annotated[str | None, serving.Gateway] = None,
    alone: Annotated[bool, flag("--alone", help="Register with no gateway.")] = False,
    foreground: Annotated[bool, flag("--foreground", help="Stay, and log here.")] = False,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds until it must serve.")
    ] = 600,
    config: Annotated[Path | None, serving.ConfigFile] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Start an engine; returns when it serves. It registers with the gateway of this machine."""
    from sagellm_ir.runtime.control_plane.client import gateway_url
    from sagellm_ir.runtime.control_plane.processes import Engines

    _check_kind(engine_kind)
    engines = Engines()
    said = {
        "id": engine_id or free_id(engines),
        "model": model,
        "backend": backend,
        "pipeline": pipeline,
    }
    chosen = serving.choose(
        config,
        engine=said,
        server={"host": host, "port": port},
        control_plane={"instance_type": instance_type},
        kv_schema=kv_schema,
    )
    wanted = None if alone else gateway or chosen.control_plane.gateway or gateway_url()
    if foreground:
        serving.serve_here(chosen, wanted, patient=gateway is None, file=config)
        return
    words = words_of(chosen, kv_schema, config, wanted, patient=gateway is None)
    process = start_behind(engines, chosen.engine.id, words, wait)
    if as_json:
        shared.emit_json(asdict(process))
    else:
        shared.emit(f"engine {process.engine_id} serves {process.model} at {process.url}/v1")


def _check_kind(kind: str) -> None:
    """Only our engine is started here; others have commands of their own.

    Raises:
        SageIRError: it is another one.
    """
    if kind == OURS:
        return
    if kind in ("vllm", "lmdeploy", "llm"):
        help_ = (
            f"run it planned: --engine-kind sagellm --backend {kind}; or start its own server and "
            "`sagellm-ir llm engine attach URL`"
        )
    else:
        help_ = suggest(kind, (OURS,))
    raise SageIRError(Diagnostic(f"engine kind {kind!r} cannot be started here", help=help_))


@shared.command(app, "list", example="--json")
def list_engines(
    gateway: Annotated[
        str | None, typer.Option("--gateway", metavar="URL", help="List the engines it knows.")
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """The engines that run on this machine, or that a gateway knows."""
    if gateway is not None:
        from sagellm_ir.runtime.control_plane.client import UnifiedInferenceClient

        with UnifiedInferenceClient.create(gateway, timeout=10.0) as client:
            title, rows = f"Engines at {gateway}", client.engines()
    else:
        from sagellm_ir.runtime.control_plane.processes import Engines

        title = "Engines of this machine"
        rows = [
            {**asdict(process), "state": "READY" if process.ready else "STARTING"}
            for process in Engines().running()
        ]
    if as_json:
        shared.emit_json(rows)
    else:
        print_engines(title, rows)


def print_engines(title: str, rows: list[dict[str, Any]]) -> None:
    """A table of engines, as this machine's files or a gateway tell of them."""
    if not rows:
        shared.note(f"{title}: none; `llm engine start MODEL` starts one")
        return
    shared.print_table(
        title,
        ("id", "state", "model", "where"),
        (
            (
                row["engine_id"],
                row["state"],
                row.get("model") or row.get("model_id"),
                row.get("url") or (f"{row['host']}:{row['port']}" if "host" in row else ""),
            )
            for row in rows
        ),
    )


@shared.command(app, "status", example="sagellm-0")
def status(
    engine_id: Annotated[str, typer.Argument(metavar="ID", help="Of `llm engine list`.")],
    as_json: shared.AsJson = False,
) -> None:
    """What an engine does: its state, load, and figures."""
    import httpx

    from sagellm_ir.runtime.control_plane.processes import Engines

    process = Engines().find(engine_id)
    found: dict[str, Any] = {**asdict(process), "state": "STARTING", "info": None}
    if process.url is not None:
        try:
            ready = httpx.get(f"{process.url}/ready", timeout=10.0)
            info = httpx.get(f"{process.url}/info", timeout=10.0)
            found |= {"state": "READY" if ready.is_success else "DRAINING"}
            found |= {"info": info.json() if info.is_success else None}
        except httpx.HTTPError as error:
            raise SageIRError(
                Diagnostic(f"engine {engine_id!r} does not answer at {process.url}: {error}")
            ) from None
    if as_json:
        shared.emit_json(found)
        return
    load = (found["info"] or {}).get("load") or {}
    rows = [(name, found[name]) for name in ("state", "model", "backend", "url", "gateway", "pid")]
    shared.print_table(f"Engine {engine_id}", ("what", "value"), [*rows, *load.items()])


@shared.command(app, "stop", example="sagellm-0")
def stop(
    engine_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Of `llm engine list`.")
    ] = None,
    everything: Annotated[bool, flag("--all", help="All of this machine.")] = False,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds for running requests to end.")
    ] = 60,
    kill: Annotated[bool, flag("--kill", help="End it at once after that.")] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Stop engines: they take nothing new, finish what runs, deregister, and end."""
    from sagellm_ir.runtime.control_plane.processes import Engines

    if (engine_id is None) != everything:
        raise typer.BadParameter("give one engine's ID, or --all")
    engines = Engines()
    names = [p.engine_id for p in engines.running()] if engine_id is None else [engine_id]
    stopped = {name: engines.stop(name, wait, kill=kill) for name in names}
    if as_json:
        shared.emit_json(stopped)
    elif not stopped:
        shared.note("no engine runs here")
    else:
        for name, ended in stopped.items():
            shared.emit(f"engine {name} {'stopped' if ended else 'still runs'}")
    if not all(stopped.values()):
        raise SageIRError(
            Diagnostic("an engine still finishes requests", help="wait longer, or --kill")
        )


@shared.command(app, "attach", example="http://gpu1:PORT --model qwen")
def attach(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a server with an OpenAI API.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Default: the first it serves.")
    ] = None,
    engine_kind: Annotated[
        str, typer.Option("--engine-kind", metavar="KIND", help="vllm, lmdeploy, ...")
    ] = "vllm",
    engine_id: Annotated[str | None, serving.EngineId] = None,
    gateway: Annotated[str | None, serving.Gateway] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Make a running server of another engine known to a gateway, which then checks its health."""
    from sagellm_ir.runtime.control_plane.attach import attach_server
    from sagellm_ir.runtime.control_plane.client import gateway_key, gateway_url

    record = attach_server(
        gateway or gateway_url(),
        url,
        kind=engine_kind,
        model=model,
        engine_id=engine_id,
        api_key=gateway_key(),
    )
    if as_json:
        shared.emit_json(asdict(record))
    else:
        shared.emit(f"engine {record.engine_id} serves {record.model} at the gateway")
