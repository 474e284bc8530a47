"""`ApiError`: what a client did wrong, or what went wrong here, as the OpenAI API says it."""

import math
from collections.abc import Mapping
from typing import Any

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.control_plane.member import EngineLost
from sagellm_ir.runtime.engines.answers import (
    EngineBusy,
    EngineDraining,
    EngineFailed,
    RequestAborted,
)

__all__ = ["ApiError", "api_error", "sentence"]

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
DRAIN_RETRY = 5
"""Seconds after which another engine may have taken a draining one's place."""


class ApiError(Exception):
    """An answer with an error status.

    Args:
        status: of HTTP.
        message: one or two sentences for people.
        code: one word for programs.
        param: the field of the body that is wrong.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def api_error(error: SageIRError) -> ApiError:
    """What the engine said, as an answer."""
    if isinstance(error, EngineBusy):
        wait = {"Retry-After": str(math.ceil(error.retry_after))}
        return ApiError(429, sentence(error), "engine_busy", headers=wait)
    if isinstance(error, EngineDraining):
        wait = {"Retry-After": str(DRAIN_RETRY)}
        return ApiError(503, sentence(error), "engine_draining", headers=wait)
    if isinstance(error, EngineFailed):
        return ApiError(500, sentence(error), "engine_failed")
    if isinstance(error, RequestAborted):
        return ApiError(400, sentence(error), "aborted")
    if isinstance(error, EngineLost):
        status = 503 if error.retry_after is None else 429
        wait = {"Retry-After": str(math.ceil(error.retry_after or DRAIN_RETRY))}
        return ApiError(status, sentence(error), "engine_lost", headers=wait)
    return ApiError(400, sentence(error), "invalid_request")


def sentence(error: SageIRError) -> str:
    """All that an error says, on one line."""
    found = (f"{d.message} ({d.help})" if d.help else d.message for d in error.diagnostics)
    return "; ".join(found)
