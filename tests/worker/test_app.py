"""How a worker starts, and how a slot goes on after a setback."""

from __future__ import annotations

import os
import subprocess
import sys

from worker.app import setback_seconds


def test_the_first_setback_costs_nothing_and_then_the_wait_doubles() -> None:
    assert [setback_seconds(n) for n in (0, 1, 2, 3, 4, 9, 50)] == [0, 0, 1, 2, 4, 120, 120]


def test_a_worker_whose_signing_key_is_none_does_not_start() -> None:
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "train", "-c", "1"]
    key = {"MILLINER_SIGNING_KEY_FILE": "/dev/null"}
    ended = subprocess.run(command, env=os.environ | key, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "MILLINER_SIGNING_KEY_FILE: /dev/null: no private key can be read from it" in ended.stderr
    assert "openssl genpkey -algorithm ed25519" in ended.stderr
