"""`listen`: the socket of a server, before it takes requests."""

from socket import socket

import uvicorn

from sagellm_ir.diagnostics import Diagnostic, SageIRError

__all__ = ["listen"]


def listen(config: uvicorn.Config) -> socket:
    """A socket bound to the address of a server.

    Raises:
        SageIRError: the address cannot be listened on.
    """
    try:
        return config.bind_socket()
    except SystemExit:  # what uvicorn makes of an OSError, after logging it
        message = f"cannot listen on {config.host}:{config.port}"
        help_ = "choose another --port (0 is any free one), or stop what listens there"
        raise SageIRError(Diagnostic(message, help=help_)) from None
