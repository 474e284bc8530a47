"""The real gateway package, around our `FleetManager`. Needs the extra `gateway`."""

import contextlib
import io
import logging

from fastapi import FastAPI
from sagellm_gateway import create_app

from sagellm_ir.runtime.control_plane.management import REPORTS, add_reports
from sagellm_ir.runtime.control_plane.manager import FleetManager

__all__ = ["sage_gateway"]


def sage_gateway(fleet: FleetManager) -> FastAPI:
    """`sagellm_gateway`'s application over a fleet, and the route for engines' reports.

    The package has one application a process, which the next call gives again, over its own fleet:
    serve one at a time. Start the fleet before engines register, and stop it after the application
    ended.
    """
    logging.getLogger("sagellm_gateway").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        app: FastAPI = create_app(control_plane=fleet)
    _forget_reports(app)
    add_reports(app, fleet)
    return app


def _forget_reports(app: FastAPI) -> None:
    """Take out the route of an earlier fleet, which would be found first."""
    kept = [route for route in app.router.routes if getattr(route, "name", None) != REPORTS]
    app.router.routes[:] = kept
