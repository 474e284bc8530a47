"""The real gateway package, around our `FleetManager`. Needs the extra `gateway`."""

import contextlib
import io
import logging

from fastapi import FastAPI
from sagellm_gateway import create_app

from sagellm_ir.runtime.control_plane.management import add_reports
from sagellm_ir.runtime.control_plane.manager import FleetManager

__all__ = ["sage_gateway"]


def sage_gateway(fleet: FleetManager) -> FastAPI:
    """`sagellm_gateway`'s application over a fleet, and the route for engines' reports.

    Start the fleet before engines register, and stop it after the application ended.
    """
    logging.getLogger("sagellm_gateway").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        app: FastAPI = create_app(control_plane=fleet)
    add_reports(app, fleet)
    return app
