"""CI runs the same script as a contributor. Hooks and issue forms are well-formed and download nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted(path for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if path.name != "config.yml")


def parsed(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_ci_runs_the_script_and_nothing_else() -> None:
    (job,) = parsed(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert job["timeout-minutes"] == 90


def test_hooks_use_the_tools_of_the_environment() -> None:
    (repo,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for hook in repo["hooks"]:
        assert hook["language"] == "system"
        assert " ".join(hook["entry"].split()[:2]) in makefile, "no make target runs the hook's command"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: str(path.name))
def test_a_form_has_a_required_field(path: Path) -> None:
    form = parsed(str(path))
    assert {"name", "description", "body"} <= set(form)
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    assert any(field.get("validations", {}).get("required") for field in asked)
