"""Another tenant's objects do not exist. The matrix is made from the routes, so a new one fails here until listed."""

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
#: Routes that name no object: a stranger's answer holds none of ours.
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
def test_anothers_object_is_not_found(
    stranger: openai.OpenAI, dataset: FileObject, paused: FineTuningJob, method: str, path: str
) -> None:
    mine = {"{file_id}": dataset.id, "{job_id}": paused.id, "{model}": f"ft:x:local::{paused.id[6:]}"}
    nobodys = {"{file_id}": "file-0", "{job_id}": "ftjob-0", "{model}": "ft:x:local::0"}
    mine_said, nobodys_said = (ask(stranger, method, fill(path, names)) for names in (mine, nobodys))
    assert (mine_said.status_code, nobodys_said.status_code) == (404, 404)
    assert mine_said.json()["error"]["code"] == nobodys_said.json()["error"]["code"]


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES - OPEN))
def test_no_key_no_entry(stack: Record, method: str, path: str) -> None:
    for key in (None, "mln_0000000000000000_" + "A" * 43):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = httpx.request(method, stack.base_url.removesuffix("/v1") + path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_strangers_lists_are_empty(stranger: openai.OpenAI, dataset: FileObject, paused: FineTuningJob) -> None:
    assert list(stranger.files.list()) == []
    assert list(stranger.fine_tuning.jobs.list()) == []
    assert all(model.owned_by == "milliner" for model in stranger.models.list())


def test_a_strangers_job_cannot_use_our_file(stranger: openai.OpenAI, dataset: FileObject) -> None:
    with pytest.raises(openai.NotFoundError, match="no file"):
        stranger.fine_tuning.jobs.create(model="SmolLM2-135M-Instruct", training_file=dataset.id)
    own = stranger.files.create(file=("a.jsonl", b'{"text":"x"}'), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError, match="no file"):
        stranger.fine_tuning.jobs.create(
            model="SmolLM2-135M-Instruct", training_file=own.id, validation_file=dataset.id
        )
    stranger.files.delete(own.id)


@pytest.mark.parametrize("question", ["estimate", "preview"])
def test_a_strangers_question_cannot_use_our_file(stranger: openai.OpenAI, dataset: FileObject, question: str) -> None:
    body = {"model": "SmolLM2-135M-Instruct", "training_file": dataset.id}
    with pytest.raises(openai.NotFoundError, match="no file") as refused:
        stranger.post(f"/fine_tuning/{question}", cast_to=httpx.Response, body=body)
    assert (refused.value.code, refused.value.param) == ("file_not_found", "training_file")


def test_every_session_commits_before_the_answer() -> None:
    """A plain `yield` dependency commits after the 200 is sent, and a failed commit still shows 200."""
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
