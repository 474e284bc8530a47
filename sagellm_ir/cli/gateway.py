"""`gateway ...`: one address in front of a fleet of engines."""

from pathlib import Path
from typing import Annotated, Any

import typer
from attrs import evolve

from sagellm_ir.cli import shared
from sagellm_ir.cli.engine import print_engines
from sagellm_ir.cli.help import group
from sagellm_ir.diagnostics import Diagnostic, SageIRError

__all__ = ["app"]

app = group("gateway", "One address in front of a fleet of engines.", example="start")
KINDS = ("auto", "sage", "stock", "own")


@shared.command(app, "start", example="--prefer domestic")
def start(
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="|".join(KINDS),
            help="sage: SAGE's gateway with our routing and failover; stock: that package alone; "
            "own: ours, without SAGE's packages; auto: sage if it is installed, else own.",
        ),
    ] = "auto",
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Default: SAGE's gateway port.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="NAME", help="SAGE's order of requests.")
    ] = None,
    routing: Annotated[
        str, typer.Option("--routing", metavar="NAME", help="How an engine is chosen.")
    ] = "longest_prefix",
    prefer: Annotated[
        list[str] | None,
        typer.Option("--prefer", metavar="DEVICE", help="Accelerators first: ascend, domestic."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The configuration.")
    ] = None,
) -> None:
    """Serve the gateway here until Ctrl-C or SIGTERM. Engines register with it by themselves."""
    shared.one_of("--kind", kind, KINDS)
    from sagellm_ir.runtime.config import load_config
    from sagellm_ir.runtime.control_plane import gateways
    from sagellm_ir.runtime.control_plane.routing import Router, accelerators
    from sagellm_ir.runtime.ports import gateway_port

    found = load_config(config)
    chosen = gateways.choose(kind)
    place = evolve(found.server, host=host, port=gateway_port() if port is None else port)
    if chosen == "stock":
        gateways.run_stock(place)
        return
    router = Router(routing, accelerators(prefer or found.control_plane.prefer))

    def started(url: str) -> None:
        shared.emit(f"gateway ({chosen}) at {url}/v1")

    if chosen == "sage":
        gateways.run_sage(place, router, policy or found.control_plane.policy, started)
    elif policy is not None:
        raise SageIRError(Diagnostic("--policy is SAGE's: our own gateway has only --routing"))
    else:
        gateways.run_own(place, router, found.limits, started)


@shared.command(app, "status", example="--json")
def status(
    url: Annotated[
        str | None, typer.Option("--gateway", metavar="URL", help="Default: this machine's.")
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Whether a gateway answers, and the models and engines behind it."""
    from sagellm_ir.runtime.control_plane.client import UnifiedInferenceClient, gateway_url

    place = url or gateway_url()
    with UnifiedInferenceClient.create(place, timeout=10.0) as client:
        found: dict[str, Any] = {
            "gateway": place,
            "models": client.models(),
            "engines": client.engines(),
        }
    if as_json:
        shared.emit_json(found)
        return
    print_engines(f"Gateway {place}", found["engines"])
