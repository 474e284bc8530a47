"""`llm engine ...`: start, list, look at and stop engines of this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from attrs import asdict, evolve

from sagellm_ir.cli import shared
from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest

if TYPE_CHECKING:
    from sagellm_ir.runtime.config import SageConfig
    from sagellm_ir.runtime.control_plane.processes import EngineProcess, Engines

__all__ = ["app", "choose", "run_here"]

app = typer.Typer(
    name="engine",
    no_args_is_help=True,
    help="Engines in the background of this machine.",
    epilog="Example: sage llm engine start smollm2-135m --engine-kind sagellm",
)

EngineId = typer.Option("--engine-id", metavar="ID", help="Its name at the gateway.")
Backend = typer.Option("--backend", metavar="KIND", help="What runs it: `backend list`.")
KVSchema = typer.Option("--kv-schema", metavar="preset=NAME", help="How KV is stored.")
PipelineText = typer.Option("--pipeline", "-p", metavar="TEXT", help="Passes: O0 to O3, or a list.")
Host = typer.Option("--host", metavar="ADDRESS", help="Where to listen.")
Port = typer.Option("--port", min=0, max=65535, help="0: any free one.")
InstanceType = typer.Option(
    "--instance-type", metavar="TYPE", help="general, prefilling or decoding."
)
Gateway = typer.Option("--gateway", metavar="URL", help="Register there; it must answer.")
ConfigFile = typer.Option(
    "--config", metavar="FILE", help="The configuration: see `sage infer config show`."
)
OURS = "sagellm"
LOG_TAIL = 4096


@app.callback()
def _group() -> None:
    """Engines in the background of this machine."""


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


def run_here(
    config: "SageConfig", gateway: str | None, *, patient: bool, file: Path | None = None
) -> None:
    """Serve in this process, and say where. `file`: what the configuration was read from."""
    from sagellm_ir.runtime.config import FILE_VARIABLE

    if file is not None:
        # An engine's loader and its workers read the configuration themselves.
        os.environ[FILE_VARIABLE] = str(file.resolve())
    try:
        from sagellm_ir.runtime.control_plane.serving import serve_engine
    except ImportError as error:
        raise SageIRError(
            Diagnostic(f"serving needs {error.name}", help="pip install 'sagellm-ir[server]'")
        ) from None
    from sagellm_ir.runtime.control_plane.processes import EngineProcess, Engines

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


@shared.command(app, "start", example="llm engine start smollm2-135m --kv-schema preset=fp8")
def start(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A known name, a folder or a file.")
    ],
    engine_kind: Annotated[
        str, typer.Option("--engine-kind", metavar="KIND", help="Only sagellm can be started.")
    ] = OURS,
    engine_id: Annotated[str | None, EngineId] = None,
    backend: Annotated[str | None, Backend] = None,
    kv_schema: Annotated[str | None, KVSchema] = None,
    pipeline: Annotated[str | None, PipelineText] = None,
    host: Annotated[str | None, Host] = None,
    port: Annotated[int, Port] = 0,
    instance_type: Annotated[str | None, InstanceType] = None,
    gateway: Annotated[str | None, Gateway] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Register with no gateway.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and log here.")] = False,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds until it must serve.")
    ] = 600,
    config: Annotated[Path | None, ConfigFile] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Start an engine; returns when it serves. It registers with the gateway of this machine."""
    from sagellm_ir.runtime.control_plane.client import gateway_url
    from sagellm_ir.runtime.control_plane.processes import Engines

    _check_kind(engine_kind)
    engines = Engines()
    said = {
        "id": engine_id or _free_id(engines),
        "model": model,
        "backend": backend,
        "pipeline": pipeline,
    }
    chosen = choose(
        config,
        engine=said,
        server={"host": host, "port": port},
        control_plane={"instance_type": instance_type},
        kv_schema=kv_schema,
    )
    wanted = None if alone else gateway or chosen.control_plane.gateway or gateway_url()
    if foreground:
        run_here(chosen, wanted, patient=gateway is None, file=config)
        return
    words = _words(chosen, kv_schema, config, wanted, patient=gateway is None)
    process = _start_behind(engines, chosen.engine.id, words, wait)
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
            "`sage infer llm engine attach URL`"
        )
    else:
        help_ = suggest(kind, (OURS,))
    raise SageIRError(Diagnostic(f"engine kind {kind!r} cannot be started here", help=help_))


def _free_id(engines: "Engines") -> str:
    number = 0
    while engines.get(f"sagellm-{number}") is not None:
        number += 1
    return f"sagellm-{number}"


def _words(
    config: "SageConfig",
    kv_schema: str | None,
    file: Path | None,
    gateway: str | None,
    patient: bool,
) -> list[str]:
    """The same start, as words for a process of its own."""
    chosen, server = config.engine, config.server
    words = ["llm", "engine", "start", chosen.model, "--foreground", "--engine-id", chosen.id]
    words += ["--backend", chosen.backend, "--pipeline", chosen.pipeline]
    words += ["--host", server.host, "--port", str(server.port)]
    words += ["--instance-type", config.control_plane.instance_type]
    words += ["--kv-schema", kv_schema] if kv_schema else []
    words += ["--config", str(file)] if file else []
    if gateway is None:
        words.append("--alone")
    elif not patient:
        words += ["--gateway", gateway]
    return words


def _start_behind(
    engines: "Engines", engine_id: str, words: list[str], wait: float
) -> "EngineProcess":
    """Start a process and wait until it serves.

    Raises:
        SageIRError: it ends before that, or takes too long; what it said is told.
    """
    path = engines.log(engine_id)
    with open(path, "w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "sagellm_ir", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until = time.monotonic() + wait
    with shared.working(f"starting engine {engine_id}"):
        while child.poll() is None:
            process = engines.get(engine_id)
            if process is not None and process.pid == child.pid and process.ready:
                return process
            if time.monotonic() > until:
                child.terminate()
                message = f"engine {engine_id!r} does not serve after {wait:g} s"
                raise SageIRError(Diagnostic(message, help=f"its log: {path}"))
            time.sleep(0.05)
    said = path.read_text(errors="replace")[-LOG_TAIL:].strip()
    raise SageIRError(
        Diagnostic(f"engine {engine_id!r} ended before it served", notes=tuple(said.splitlines()))
    )


@shared.command(app, "list", example="llm engine list --json")
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
            _show(f"Engines at {gateway}", client.engines(), as_json)
        return
    from sagellm_ir.runtime.control_plane.processes import Engines

    rows = [
        {**asdict(process), "state": "READY" if process.ready else "STARTING"}
        for process in Engines().running()
    ]
    _show("Engines", rows, as_json)


def _show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        shared.emit_json(rows)
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


@shared.command(app, "status", example="llm engine status sagellm-0")
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


@shared.command(app, "stop", example="llm engine stop sagellm-0")
def stop(
    engine_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Of `llm engine list`.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of this machine.")] = False,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds for running requests to end.")
    ] = 60,
    kill: Annotated[bool, typer.Option("--kill", help="End it at once after that.")] = False,
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
    else:
        for name, ended in stopped.items():
            shared.emit(f"engine {name} {'stopped' if ended else 'still runs'}")
    if not all(stopped.values()):
        raise SageIRError(
            Diagnostic("an engine still finishes requests", help="wait longer, or --kill")
        )


@shared.command(app, "attach", example="llm engine attach http://gpu1:PORT --model qwen")
def attach(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a server with an OpenAI API.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Default: the first it serves.")
    ] = None,
    engine_kind: Annotated[
        str, typer.Option("--engine-kind", metavar="KIND", help="vllm, lmdeploy, ...")
    ] = "vllm",
    engine_id: Annotated[str | None, EngineId] = None,
    gateway: Annotated[str | None, Gateway] = None,
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
