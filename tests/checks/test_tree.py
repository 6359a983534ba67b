"""Rules for the source tree: short files, specific names, and a reason for each exception from a lint rule."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    ROOT / name for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
]  # fmt: skip
CODE = [path for path in FILES if path.suffix == ".py" and path.exists()]


def test_no_file_is_over_500_lines() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in CODE if (lines := len(path.read_text().splitlines())) > 500}
    assert not long


def test_names_are_specific() -> None:
    vague = re.compile(r"(^|/)(utils?|common|helpers?|misc|managers?|factory)(/|\.py$)")
    assert not [path for path in FILES if vague.search(path.relative_to(ROOT).as_posix())]


def test_every_module_has_a_docstring() -> None:
    bare = [path for path in CODE if path.read_text().strip() and not path.read_text().startswith(('"""', "#!"))]
    assert not bare


def test_lint_exceptions_have_a_reason() -> None:
    bare = re.compile(r"#\s*noqa(?!: \w+ +[(#])|#\s*type: ignore(?!\[)|pytest\.mark\.(skip|xfail)\((?!.*reason)")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in CODE
        if path != Path(__file__)
        for line in path.read_text().splitlines()
        if bare.search(line)
    ]
    assert not found


def test_only_shared_linux_reads_the_environment() -> None:
    """Other modules get their settings from pydantic."""
    for path in CODE:
        name = path.relative_to(ROOT).as_posix()
        if name.split("/")[0] in {"shared", "api", "worker", "client"} and name != "shared/linux.py":
            # Assignments are allowed: the trainer child sets variables that libraries read at import.
            assert not re.search(r"getenv|environ\.get|environ\[[^]]+\](?! = )", path.read_text()), name


def test_no_test_is_imported() -> None:
    """Data that two test modules share is in a module that is not a test."""
    imported = re.compile(r"^\s*(?:from|import)\s+\S*\btest_\w+|^\s*from\s+\.\s+import\s+.*\btest_", re.M)
    assert not [str(path.relative_to(ROOT)) for path in CODE if imported.search(path.read_text())]


def test_processes_are_started_in_one_place() -> None:
    """shared/linux.py builds their environment from an empty one. Exempt: deploy/, whose servers get its settings."""
    starting = re.compile(
        r"subprocess\.(Popen|run|call|check_\w+)\(|os\.(fork|exec|spawn|posix_spawn|system|popen)|multiprocessing"
    )
    for path in CODE:
        name = path.relative_to(ROOT).as_posix()
        if name.split("/")[0] in {"shared", "api", "worker", "client"} and name != "shared/linux.py":
            assert not starting.search(path.read_text()), name
