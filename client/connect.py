"""Find the API, connect the official `openai` client to it, and describe its errors in one line.

Owns: choosing an address and a key, turning wire objects into `shared.schemas.responses`. Must not print.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import openai
from openai import OpenAI

from deploy.local.folder import Folder
from shared.errors import Unavailable
from shared.schemas.responses import File, Job
from shared.settings import get_settings

_opened = ExitStack()


class Address(NamedTuple):
    base_url: str
    api_key: str


def address(data: Path | None = None) -> Address:
    """MILLINER_BASE_URL and MILLINER_API_KEY if both are set and `data` is None, otherwise those of the local stack.

    Raises Unavailable: there is no server; the message says how to start one.
    """
    settings = get_settings()
    if data is None and settings.base_url and settings.api_key:
        return Address(settings.base_url, settings.api_key.get_secret_value())
    if data is None and (settings.base_url or settings.api_key):
        found, missing = ("MILLINER_BASE_URL", "MILLINER_API_KEY")[:: 1 if settings.base_url else -1]
        raise Unavailable(f"{found} is set but {missing} is not; set both, or neither to use the local stack")
    folder = Folder(data or settings.data)
    if record := folder.record():
        return Address(record.base_url, record.api_key)
    raise Unavailable(
        f"no stack runs on {folder.root}; start one with: milliner up{_option(data)} "
        "(or set MILLINER_BASE_URL and MILLINER_API_KEY)"
    )


def connect(data: Path | None = None) -> OpenAI:
    """The official client, unchanged, for our server. `disconnect` closes it."""
    where = address(data)
    return _opened.enter_context(OpenAI(base_url=where.base_url, api_key=where.api_key))


def disconnect() -> None:
    """Close every connection that `connect` opened."""
    _opened.close()


def job_of(wire: openai.BaseModel) -> Job:
    """The job with the fields that we add. Fields unknown to this version are ignored."""
    return Job.model_validate(wire.to_dict())


def file_of(wire: openai.BaseModel) -> File:
    """The file with its hash and its report."""
    return File.model_validate(wire.to_dict())


def explain(error: openai.OpenAIError) -> str:
    """One line: the API's message, its code, and the request id to find in its log."""
    if isinstance(error, openai.APITimeoutError):
        return f"the API at {error.request.url.copy_with(path='/')} did not answer in time; see: milliner doctor"
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        host = f"{error.request.url.host}:{error.request.url.port or error.request.url.scheme}"
        return f"cannot reach the API at {host} ({cause}); start the local stack with: milliner up"
    if isinstance(error, openai.APIStatusError):
        tags = [error.code or f"HTTP {error.status_code}"]
        if error.param:
            tags.append(f"param {error.param}")
        if error.request_id:
            tags.append(f"request {error.request_id}")
        return f"{_message(error)} ({', '.join(tags)})"
    return str(error)


def _option(data: Path | None) -> str:
    return f" --data {data}" if data else ""


def _message(error: openai.APIStatusError) -> str:
    """The message of the error object; the client's own text repeats the whole body."""
    if isinstance(error.body, dict) and isinstance(error.body.get("message"), str):
        return str(error.body["message"])
    return error.message
