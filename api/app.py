"""The FastAPI application: routes, error responses, request ids, the body size limit.

Every unsuccessful response has the body `{"error": {message, type, param, code}}`, also where FastAPI would send its
own 422: the official client reads error messages only from that shape. Run it with `uvicorn api.app:app`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.routes import estimate, files, health, jobs, models, preview
from shared.broker.doorbell import Bell
from shared.errors import Conflict, InvalidRequest, MillinerError, TooLarge, Unavailable
from shared.ids import new_id
from shared.settings import get_settings
from shared.telemetry import bind, configure, log

JSON_LIMIT = 1024 * 1024
FORM_SLACK = 64 * 1024


def create_app() -> FastAPI:
    """Create an application with the settings of this process."""
    app = FastAPI(title="Milliner", version=version("milliner"), lifespan=_lifespan, docs_url="/docs", redoc_url=None)
    for module in (files, jobs, estimate, preview, models, health):
        app.include_router(module.router)
    app.add_exception_handler(MillinerError, _milliner_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(DataError, _data_error)
    app.add_middleware(Envelope)
    return app


class Envelope:
    """Middleware that gives every request an id, a body size limit and, if the handler fails, a 500 response.

    The id is bound to the log and sent in the header `x-request-id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, status = new_id("req_"), time.perf_counter(), 0
        bind(request_id=request_id)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self.app(scope, _limited(scope, receive), send_with_id)
        except Exception:
            log.exception("request.failed", method=scope["method"], path=scope["path"])
            if status == 0:
                error = MillinerError(f"internal server error; the server log has the cause under {request_id}")
                await _response(error)(scope, receive, send_with_id)
        finally:
            elapsed = round(1000 * (time.perf_counter() - started), 1)
            log.info("request.served", method=scope["method"], path=scope["path"], status=status, ms=elapsed)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    configure("api")
    app.state.bell = Bell()
    yield
    app.state.bell.close()


def _limited(scope: Scope, receive: Receive) -> Receive:
    """Wrap `receive` so that a body over the limit is a 413, also if it has no content-length."""
    upload = scope["method"] == "POST" and scope["path"] == "/v1/files"
    limit = get_settings().max_file_bytes + FORM_SLACK if upload else JSON_LIMIT
    seen = 0

    async def receive_limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            # HTTPException, because FastAPI turns any other exception raised while reading a body into a 400.
            raise HTTPException(TooLarge.status, f"the body is over {limit:,} bytes, the limit of this endpoint")
        return message

    return receive_limited


async def _milliner_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MillinerError)
    return _response(error)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """Convert a pydantic error to a 400. `param` and `code` describe the first problem, the message up to five."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    lines = [f"{_path(p)}: {p['msg'].removeprefix('Value error, ')}{_found(p)}" for p in problems[:5]]
    if problems[0]["type"] == "json_invalid":
        return _response(InvalidRequest("the body is not JSON", code="invalid_json"))
    first, param = problems[0], _path(problems[0])
    if first["type"] == "unknown_parameter":
        param = first["ctx"]["key"] if param == "body" else f"{param}.{first['ctx']['key']}"
    code = first["type"] if first["type"] in ("unknown_parameter", "missing") else "invalid_value"
    return _response(InvalidRequest("; ".join(lines), param=param, code=code))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Convert errors of routing and of body parsing: unknown path, wrong method, body too large or incomplete."""
    assert isinstance(error, HTTPException)
    if error.status_code == TooLarge.status:
        return _response(TooLarge(error.detail))
    code = "unknown_url" if error.status_code in (404, 405) else InvalidRequest.code
    wrapped = InvalidRequest(f"{request.method} {request.url.path}: {error.detail}; see /docs", code=code)
    wrapped.status = error.status_code
    return _response(wrapped)


async def _data_error(request: Request, error: Exception) -> JSONResponse:
    """Report text in a path or query that Postgres cannot store, such as a NUL. Bodies are validated earlier."""
    message = "the URL contains characters that are not allowed in an id, such as NUL"
    return _response(InvalidRequest(message, code="invalid_value"))


def _response(error: MillinerError) -> JSONResponse:
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    headers = {"x-should-retry": "false"} if isinstance(error, Conflict) else {}
    if isinstance(error, Unavailable) and error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    return JSONResponse({"error": body}, status_code=error.status, headers=headers)


def _path(problem: dict[str, Any]) -> str:
    """Convert a pydantic `loc` to a JSON path without the request part and the branches of a union.

    `("body", "lora", "r", "int")` becomes `lora.r`.
    """
    parts = [str(part) for part in problem["loc"] if part not in ("body", "query", "header", "path")]
    branches = {"int", "float", "str", "literal['auto']", "constrained-int", "constrained-float", "list[str]"}
    names = [p for p in parts if p not in branches and not p.startswith(("literal", "constrained", "list["))]
    return ".".join(names) or "body"


def _found(problem: dict[str, Any]) -> str:
    if problem["type"] in ("missing", "unknown_parameter") or "input" not in problem:
        return ""
    shown = repr(problem["input"])
    return f" (found {shown if len(shown) <= 60 else shown[:59] + '…'})"


app = create_app()
