"""The application: routes, the error envelope, request ids, the size limit.

Every answer that is not a success is `{"error": {message, type, param, code}}`, FastAPI's own 422 included: the
official client shows a message only from that shape. `uvicorn api.app:app` serves it.
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
    """A fresh application on this process's settings."""
    app = FastAPI(title="Milliner", version=version("milliner"), lifespan=_lifespan, docs_url="/docs", redoc_url=None)
    for noun in (files, jobs, estimate, preview, models, health):
        app.include_router(noun.router)
    app.add_exception_handler(MillinerError, _milliner_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(DataError, _unstorable)
    app.add_middleware(Envelope)
    return app


class Envelope:
    """Around every request: an id in the log and in `x-request-id`, a size limit, and an answer even when we break."""

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
            log.exception("request.broke", method=scope["method"], path=scope["path"])
            if status == 0:
                broken = MillinerError(f"the server broke on this request; its log has the cause under {request_id}")
                await _answer(broken)(scope, receive, send_with_id)
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
    """Count the body as it comes, so that one without a content-length is bounded too."""
    upload = scope["method"] == "POST" and scope["path"] == "/v1/files"
    limit = get_settings().max_file_bytes + FORM_SLACK if upload else JSON_LIMIT
    seen = 0

    async def receive_limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            # An HTTPException, because FastAPI turns any other one that comes out of a body into a 400.
            raise HTTPException(TooLarge.status, f"the body is over {limit:,} bytes, the most this endpoint takes")
        return message

    return receive_limited


async def _milliner_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MillinerError)
    return _answer(error)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """The first problem as OpenAI words it: `param` is the JSON path, the message says found and allowed."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    lines = [f"{_path(p)}: {p['msg'].removeprefix('Value error, ')}{_found(p)}" for p in problems[:5]]
    if problems[0]["type"] == "json_invalid":
        return _answer(InvalidRequest("the body is not JSON", code="invalid_json"))
    first, param = problems[0], _path(problems[0])
    if first["type"] == "unknown_parameter":
        param = first["ctx"]["key"] if param == "body" else f"{param}.{first['ctx']['key']}"
    code = first["type"] if first["type"] in ("unknown_parameter", "missing") else "invalid_value"
    return _answer(InvalidRequest("; ".join(lines), param=param, code=code))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Unknown routes, wrong methods, bodies over the limit or cut off."""
    assert isinstance(error, HTTPException)
    if error.status_code == TooLarge.status:
        return _answer(TooLarge(error.detail))
    code = "unknown_url" if error.status_code in (404, 405) else InvalidRequest.code
    wrapped = InvalidRequest(f"{request.method} {request.url.path}: {error.detail}; see /docs", code=code)
    wrapped.status = error.status_code
    return _answer(wrapped)


async def _unstorable(request: Request, error: Exception) -> JSONResponse:
    """Text in a path or a query that Postgres cannot hold, such as a NUL; bodies are checked before."""
    return _answer(InvalidRequest("the URL holds characters that no id has", code="invalid_value"))


def _answer(error: MillinerError) -> JSONResponse:
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    headers = {"x-should-retry": "false"} if isinstance(error, Conflict) else {}
    if isinstance(error, Unavailable) and error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    return JSONResponse({"error": body}, status_code=error.status, headers=headers)


def _path(problem: dict[str, Any]) -> str:
    """`("body","lora","r","int")` → `lora.r`: without where it came from and the arms of a union."""
    parts = [str(part) for part in problem["loc"] if part not in ("body", "query", "header", "path")]
    arms = {"int", "float", "str", "literal['auto']", "constrained-int", "constrained-float", "list[str]"}
    return (
        ".".join(p for p in parts if p not in arms and not p.startswith(("literal", "constrained", "list["))) or "body"
    )


def _found(problem: dict[str, Any]) -> str:
    if problem["type"] in ("missing", "unknown_parameter") or "input" not in problem:
        return ""
    shown = repr(problem["input"])
    return f" (found {shown if len(shown) <= 60 else shown[:59] + '…'})"


app = create_app()
