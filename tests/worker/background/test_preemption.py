"""The notice that a spot machine will be taken away, with real commands."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
import structlog
from structlog.testing import capture_logs

from shared import settings
from worker.background import preemption

Start = Callable[..., Thread | None]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`preemption.start` with a command and a short period; its thread ends with the test."""
    stop, threads = Event(), []

    def with_command(command: str, drain: Callable[[], None], *, seconds: str = "0.05") -> Thread | None:
        monkeypatch.setenv("MILLINER_NOTICE_COMMAND", command)
        monkeypatch.setenv("MILLINER_NOTICE_SECONDS", seconds)
        settings.get_settings.cache_clear()
        thread = preemption.start(stop, drain)
        if thread is not None:
            threads.append(thread)
        return thread

    yield with_command
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    settings.get_settings.cache_clear()


def test_a_notice_drains_once_and_ends_the_thread(start: Start, tmp_path: Path) -> None:
    flag, polled, drained = tmp_path / "taken away", tmp_path / "polled", list[int]()
    script = f"echo x >> {polled}; test -e {shlex.quote(str(flag))}"
    thread = start(shlex.join(["sh", "-c", script]), lambda: drained.append(1), seconds="1")
    assert thread is not None
    until(polled.exists)
    assert not drained
    flag.touch()
    thread.join(10)
    assert drained == [1]
    assert not thread.is_alive()


def test_the_first_poll_happens_at_once(start: Start) -> None:
    drained = Event()
    start("true", drained.set, seconds="3600")
    assert drained.wait(10)


def test_nothing_is_polled_without_a_command(start: Start) -> None:
    assert start("", lambda: None) is None


def test_the_command_is_run_without_a_shell(tmp_path: Path) -> None:
    flag = tmp_path / "two words"
    flag.touch()
    assert preemption.poll(f"test -e '{flag}'", timeout=5)
    assert not preemption.poll("test -e $HOME", timeout=5)
    assert not preemption.poll(f"test -e {tmp_path / 'none'} || true", timeout=5)


@pytest.mark.parametrize(
    ("command", "error"),
    [("/nowhere/to/be/found", "cannot be started"), ("test 'unclosed", "cannot be started"), ("sleep 60", "within")],
)
def test_a_failing_command_is_logged_once_and_retried(start: Start, command: str, error: str) -> None:
    with capture_logs() as logs:
        start(command, lambda: pytest.fail("drained without a notice"))
        until(lambda: bool(logs))
        time.sleep(0.3)  # five more tries
    failures = [line["error"] for line in logs if line["event"] == "notice.failed"]
    assert len(failures) == 1
    assert error in failures[0]


def test_a_command_that_works_again_can_still_drain(start: Start, tmp_path: Path) -> None:
    command, drained = tmp_path / "spot", Event()
    start(str(command), drained.set)
    (tmp_path / "new").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "new").chmod(0o755)
    (tmp_path / "new").rename(command)
    assert drained.wait(10)


def test_a_command_that_times_out_is_killed_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(preemption.Failed, match="did not end within"):
        preemption.poll(shlex.join(["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"]), timeout=1)
    until(lambda: gone(int(pid.read_text())))


def test_the_exit_code_counts_although_a_child_keeps_the_pipe_open() -> None:
    assert preemption.poll("sh -c 'sleep 60 & exit 0'", timeout=0.5)
    assert not preemption.poll("sh -c 'sleep 60 & exit 3'", timeout=0.5)


def test_the_output_goes_to_the_log_only(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('read ' + sys.stdin.read()); print('x' * 1_000_000); print('last', file=sys.stderr)"
    structlog.reset_defaults()  # an earlier test may have raised the log level
    with capture_logs() as logs:
        assert preemption.poll(shlex.join([sys.executable, "-c", code]), timeout=20)
    assert [(line["log_level"], line["code"]) for line in logs] == [("debug", 0)]
    assert len(logs[0]["output"]) <= preemption.LOGGED_BYTES
    assert capfd.readouterr() == ("", "")


def test_a_command_gets_no_settings_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLINER_S3_SECRET_KEY", "s3cret")
    monkeypatch.setenv("no_proxy", "169.254.169.254")
    structlog.reset_defaults()
    with capture_logs() as logs:
        assert preemption.poll("env", timeout=5)
    assert "no_proxy=169.254.169.254\n" in logs[0]["output"]
    assert "MILLINER_" not in logs[0]["output"]


def gone(pid: int) -> bool:
    """Return whether the process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
