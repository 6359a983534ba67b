"""How a worker starts, and how long a slot pauses after failures."""

from __future__ import annotations

import os
import subprocess
import sys

from worker.app import pause_seconds


def test_a_slot_does_not_pause_after_one_failure_and_then_doubles_the_pause() -> None:
    assert [pause_seconds(n) for n in (0, 1, 2, 3, 4, 9, 50)] == [0, 0, 1, 2, 4, 120, 120]


def test_a_worker_with_an_invalid_signing_key_does_not_start() -> None:
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "train", "-c", "1"]
    key = {"MILLINER_SIGNING_KEY_FILE": "/dev/null"}
    ended = subprocess.run(command, env=os.environ | key, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "MILLINER_SIGNING_KEY_FILE: /dev/null: no private key can be read from it" in ended.stderr
    assert "openssl genpkey -algorithm ed25519" in ended.stderr
