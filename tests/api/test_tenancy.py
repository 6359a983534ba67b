"""Objects of another tenant are not found. The cases come from the routes: a new route must be listed here."""

from __future__ import annotations

import importlib
import pkgutil

import httpx2 as httpx
import openai
import pytest
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

import api.routes
from api.app import app
from api.deps import get_session
from deploy.local.folder import Record

OPEN = {("GET", "/healthz"), ("GET", "/readyz")}
#: Routes without an object in the path: the response to another tenant contains none of our objects.
COLLECTIONS = {
    ("GET", "/v1/files"),
    ("POST", "/v1/files"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/fine_tuning/estimate"),
    ("POST", "/v1/fine_tuning/preview"),
    ("GET", "/v1/models"),
}
OBJECTS = {
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("DELETE", "/v1/files/{file_id}"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"),
    ("GET", "/v1/models/{model}"),
    ("DELETE", "/v1/models/{model}"),
}
ROUTES = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}


def test_every_route_is_listed_here() -> None:
    assert ROUTES == OPEN | COLLECTIONS | OBJECTS


@pytest.mark.parametrize(("method", "path"), sorted(OBJECTS))
def test_objects_of_another_tenant_are_not_found(
    stranger: openai.OpenAI, dataset: FileObject, paused: FineTuningJob, method: str, path: str
) -> None:
    ours = {"{file_id}": dataset.id, "{job_id}": paused.id, "{model}": f"ft:x:local::{paused.id[6:]}"}
    missing = {"{file_id}": "file-0", "{job_id}": "ftjob-0", "{model}": "ft:x:local::0"}
    for_ours, for_missing = (ask(stranger, method, fill(path, names)) for names in (ours, missing))
    assert (for_ours.status_code, for_missing.status_code) == (404, 404)
    assert for_ours.json()["error"]["code"] == for_missing.json()["error"]["code"]


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES - OPEN))
def test_a_missing_or_unknown_key_is_a_401(stack: Record, method: str, path: str) -> None:
    for key in (None, "mln_0000000000000000_" + "A" * 43):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = httpx.request(method, stack.base_url.removesuffix("/v1") + path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_lists_show_no_objects_of_another_tenant(
    stranger: openai.OpenAI, dataset: FileObject, paused: FineTuningJob
) -> None:
    assert list(stranger.files.list()) == []
    assert list(stranger.fine_tuning.jobs.list()) == []
    assert all(model.owned_by == "milliner" for model in stranger.models.list())


def test_a_job_cannot_use_a_file_of_another_tenant(stranger: openai.OpenAI, dataset: FileObject) -> None:
    with pytest.raises(openai.NotFoundError, match="no file"):
        stranger.fine_tuning.jobs.create(model="SmolLM2-135M-Instruct", training_file=dataset.id)
    own = stranger.files.create(file=("a.jsonl", b'{"text":"x"}'), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError, match="no file"):
        stranger.fine_tuning.jobs.create(
            model="SmolLM2-135M-Instruct", training_file=own.id, validation_file=dataset.id
        )
    stranger.files.delete(own.id)


@pytest.mark.parametrize("route", ["estimate", "preview"])
def test_estimates_and_previews_cannot_use_a_file_of_another_tenant(
    stranger: openai.OpenAI, dataset: FileObject, route: str
) -> None:
    body = {"model": "SmolLM2-135M-Instruct", "training_file": dataset.id}
    with pytest.raises(openai.NotFoundError, match="no file") as refused:
        stranger.post(f"/fine_tuning/{route}", cast_to=httpx.Response, body=body)
    assert (refused.value.code, refused.value.param) == ("file_not_found", "training_file")


def test_every_session_commits_before_the_response() -> None:
    """By default a `yield` dependency ends after the 200 is sent; a failed commit would go unnoticed."""
    found = 0
    for module in pkgutil.iter_modules(api.routes.__path__, "api.routes."):
        for route in importlib.import_module(module.name).router.routes:
            for dependency in route.dependant.dependencies:
                if dependency.call is get_session:
                    found += 1
                    assert dependency.scope == "function", route.path
    assert found > len(OBJECTS)


def fill(path: str, names: dict[str, str]) -> str:
    for placeholder, value in names.items():
        path = path.replace(placeholder, value)
    return path


def ask(client: openai.OpenAI, method: str, path: str) -> httpx.Response:
    url = str(client.base_url).removesuffix("/v1/") + path
    return httpx.request(method, url, headers={"authorization": f"Bearer {client.api_key}"})
