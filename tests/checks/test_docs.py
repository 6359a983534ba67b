"""The documentation matches the code: settings, commands, make targets, links, API operations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from api.app import app
from client.cli import app as cli
from shared.database import state_machine
from shared.schemas.requests import JobCreate, Lora, TrainerParams
from shared.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md"), *ROOT.glob("examples/*.md")]
)
SETTINGS = (ROOT / "docs" / "reference" / "settings.md").read_text()
API = (ROOT / "docs" / "reference" / "api.md").read_text()
COMMANDS = (ROOT / "docs" / "reference" / "commands.md").read_text()
STATES = (ROOT / "docs" / "explain" / "states.md").read_text()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    field = Settings.model_fields[name]
    (line,) = [row for row in SETTINGS.splitlines() if row.startswith(f"| `MILLINER_{name.upper()}` |")]
    assert field.description
    assert line.endswith(f"| {field.description} |")
    if isinstance(field.default, int | float | str):
        assert f"| `{field.default}` |" in line


def test_every_documented_setting_exists() -> None:
    documented = set(re.findall(r"MILLINER_([A-Z0-9_]+)", "".join(path.read_text() for path in DOCUMENTS)))
    assert documented - {name.upper() for name in Settings.model_fields} <= {""}


def test_every_operation_is_documented() -> None:
    for path in app.openapi()["paths"]:
        noun = path.split("/")[-1] if path.startswith("/v1/fine_tuning") and "}/" in path else path.split("/{")[0]
        assert noun.removeprefix("/v1").split("/")[-1] in API, path
    for field in [*Lora.model_fields, *TrainerParams.model_fields, "priority", "dry_run", "quantization"]:
        assert f"`{field}`" in API, field
    assert {"lora", "trainer", "quantization"} <= set(JobCreate.model_fields)


def test_every_command_is_documented() -> None:
    for words in command_paths(typer.main.get_command(cli), ("milliner",)):
        assert f"`{' '.join(words)}" in COMMANDS, words


def test_the_diagram_of_states_is_the_one_that_the_code_renders() -> None:
    assert re.findall(r"^```mermaid\n(.*?)\n```$", STATES, re.M | re.S) == [state_machine.mermaid()]


def test_every_reason_of_a_move_has_its_line() -> None:
    assert re.findall(r"^- `(\w+)`: ", STATES, re.M) == list(state_machine.Reason)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_targets_exist(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`|&& )make ([a-z-]+)", text, re.M)) <= targets
    for file in re.findall(r"`((?:shared|api|worker|client|deploy|migrations|tests|docs|examples)/[\w./-]*)`", text):
        assert (ROOT / file).exists(), file


def command_paths(command: Any, words: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The words of every command in a command tree."""
    if not isinstance(command, TyperGroup):
        return [words]
    below = [way for name, sub in command.commands.items() for way in command_paths(sub, (*words, name))]
    assert below
    return ([words] if command.invoke_without_command and len(words) > 1 else []) + below
