"""Run Alembic as a deployment does, in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INI = Path(__file__).resolve().parents[2] / "migrations" / "alembic.ini"


def alembic(url: str, *command: str) -> str:
    """Run an Alembic command, which must succeed. Returns its output."""
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(INI), *command],
        env=os.environ | {"MILLINER_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
