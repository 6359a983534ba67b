"""Only pyproject.toml contains the version."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

from api.app import app

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
#: Files that may contain it: the source, the history, and versions of other packages.
ALLOWED_FILES = {"pyproject.toml", "CHANGELOG.md", "constraints.txt", "migrations/released.json"}


def test_the_installed_package_and_the_api_have_the_version() -> None:
    assert version("milliner") == VERSION, "the installed version differs from pyproject.toml: run make setup"
    assert app.version == VERSION


def test_no_other_file_repeats_the_version() -> None:
    literal = re.compile(rf"(?<![\d.]){re.escape(VERSION)}(?![\d.])")
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    paths = [ROOT / name for name in names if name not in ALLOWED_FILES]
    assert not [str(path) for path in paths if path.is_file() and literal.search(path.read_text(errors="ignore"))]
