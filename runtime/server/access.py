"""What happens to every request before a route sees it: ids, keys, the body's size."""

import re
import secrets
from collections.abc import Callable, Mapping
from hashlib import blake2b
from hmac import compare_digest

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagellm_ir.runtime.server.errors import ApiError

__all__ = ["REQUEST_ID", "TRACE_ID", "Access", "error_response", "owner", "space"]

REQUEST_ID, TRACE_ID = "X-Request-ID", "X-Trace-ID"
_ID = re.compile(r"[\x21-\x7e]{1,256}")
_OPEN = frozenset({"/health", "/ready", "/metrics"})
"""What a monitor may read without a key."""


def space(tenant: str | None, salt: str | None) -> str | None:
    """Within what KV is shared: a tenant's requests of one salt. It is a request's `tenant`."""
    return None if tenant is None and salt is None else f"{tenant or ''}/{salt or ''}"


def owner(of: str | None) -> str | None:
    """The tenant of a `space`; None: nobody's."""
    return (of or "").partition("/")[0] or None


class Access:
    """An ASGI layer.

    It leaves in the scope's `state`: `request_id`, `given_id` (whether the client chose it),
    `trace_id`, `tenant`. Each key is a tenant of its own; without keys nobody is one.

    Args:
        app: what it is around.
        keys: who may ask; none: everybody.
        body_bytes: of one body, at most.
        answered: called with the status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: tuple[str, ...],
        body_bytes: int,
        answered: Callable[[int], None],
    ) -> None:
        self._app, self._body_bytes, self._answered = app, body_bytes, answered
        self._tenants: Mapping[bytes, str] = {
            key.encode(): blake2b(key.encode(), digest_size=8).hexdigest() for key in keys
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        ids = {name: value for name in (REQUEST_ID, TRACE_ID) if (value := headers.get(name))}
        wrong = [name for name, value in ids.items() if not _ID.fullmatch(value)]
        for name in wrong:
            del ids[name]
        send = self._labelled(send, ids)
        try:
            if wrong:
                message = f"header {wrong[0]} is not 1 to 256 visible ASCII characters"
                raise ApiError(400, message, "invalid_header")
            state["given_id"] = REQUEST_ID in ids
            state["request_id"] = ids.setdefault(REQUEST_ID, secrets.token_hex(12))
            state["trace_id"] = ids.setdefault(TRACE_ID, ids[REQUEST_ID])
            state["tenant"] = self._tenant(scope["path"], headers)
            body = _Bounded(receive, self._body_bytes, headers)
            await self._app(scope, body, send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)

    def _labelled(self, send: Send, ids: Mapping[str, str]) -> Send:
        """`send` that counts the answer and carries the ids back in its headers."""

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered(message["status"])
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in ids.items():
                    headers[name] = value
            await send(message)

        return labelled

    def _tenant(self, path: str, headers: Headers) -> str | None:
        """Who asks.

        Raises:
            ApiError: there are keys, and the request has none of them.
        """
        if not self._tenants or path in _OPEN:
            return None
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        found = None
        for key, tenant in self._tenants.items():  # all of them: time must not tell which is near
            if compare_digest(key, given.strip().encode()):
                found = tenant
        if scheme.lower() != "bearer" or found is None:
            wanted = {"WWW-Authenticate": "Bearer"}
            message = "expected the header Authorization: Bearer <one of this server's keys>"
            raise ApiError(401, message, "invalid_api_key", headers=wanted)
        return found


class _Bounded:
    """`receive` that refuses a body which is too large, at its announcement or on its way."""

    def __init__(self, receive: Receive, most: int, headers: Headers) -> None:
        self._receive, self._most, self._seen = receive, most, 0
        announced = headers.get("Content-Length", "0")
        if announced.isdecimal():
            self._check(int(announced))

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            self._check(self._seen)
        return message

    def _check(self, size: int) -> None:
        if size > self._most:
            message = f"the body has more than {self._most} bytes"
            raise ApiError(413, message, "body_too_large", headers={"Connection": "close"})


def error_response(error: ApiError) -> JSONResponse:
    """An error as an HTTP answer."""
    return JSONResponse(error.body(), error.status, error.headers)
