"""Where the client looks for a server, and its errors when there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from client.connect import Address, address, connect, explain
from deploy.local.folder import Record
from shared.errors import Unavailable
from shared.settings import get_settings


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Without the settings of the machine, and without a trace for the next test."""
    for name in ("BASE_URL", "API_KEY"):
        monkeypatch.delenv(f"MILLINER_{name}", raising=False)
    monkeypatch.setenv("MILLINER_DATA", str(tmp_path / "none"))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_settings_name_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLINER_BASE_URL", "http://far/v1")
    monkeypatch.setenv("MILLINER_API_KEY", "mln_x")
    assert address() == Address("http://far/v1", "mln_x")


@pytest.mark.parametrize(("given", "missing"), [("BASE_URL", "API_KEY"), ("API_KEY", "BASE_URL")])
def test_half_of_the_settings_is_an_error(monkeypatch: pytest.MonkeyPatch, given: str, missing: str) -> None:
    monkeypatch.setenv(f"MILLINER_{given}", "x")
    with pytest.raises(Unavailable, match=f"MILLINER_{given} is set but MILLINER_{missing} is not"):
        address()


def test_without_a_stack_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="start one with: milliner up "):
        address()
    with pytest.raises(Unavailable, match=f"start one with: milliner up --data {tmp_path}"):
        address(tmp_path)


def test_the_record_of_an_ended_stack_is_ignored(tmp_path: Path, stack: Record) -> None:
    (tmp_path / "stack.json").write_text(stack.model_dump_json())
    with pytest.raises(Unavailable, match="no stack runs"):
        address(tmp_path)


def test_the_running_stack_is_found_by_its_folder(stack: Record) -> None:
    assert address(Path(stack.data)) == Address(stack.base_url, stack.api_key)


def test_an_api_error_is_one_line_with_code_and_request(stack: Record) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        connect(Path(stack.data)).fine_tuning.jobs.retrieve("ftjob-none")
    said = explain(caught.value)
    assert "ftjob-none" in said
    assert "(not_found, " in said
    assert f"request {caught.value.request_id}" in said
    assert "\n" not in said


def test_a_refused_connection_says_where_and_how_to_start() -> None:
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.APIConnectionError) as caught:
        client.models.list()
    assert "cannot reach the API at 127.0.0.1:9" in explain(caught.value)
    assert "milliner up" in explain(caught.value)
