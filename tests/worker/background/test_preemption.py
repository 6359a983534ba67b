"""The spot notice, with real commands."""

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
    """`preemption.start` with a command and a short period; the watch ends with the test."""
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


def test_a_notice_drains_once_and_the_watch_ends(start: Start, tmp_path: Path) -> None:
    flag, asked, drained = tmp_path / "taken away", tmp_path / "asked", list[int]()
    script = f"echo x >> {asked}; test -e {shlex.quote(str(flag))}"
    thread = start(shlex.join(["sh", "-c", script]), lambda: drained.append(1), seconds="1")
    assert thread is not None
    until(asked.exists)
    assert not drained
    flag.touch()
    thread.join(10)
    assert drained == [1]
    assert not thread.is_alive()


def test_a_worker_that_starts_on_a_machine_that_is_going_asks_before_it_waits(start: Start) -> None:
    drained = Event()
    start("true", drained.set, seconds="3600")
    assert drained.wait(10)


def test_nothing_is_asked_where_nothing_is_set(start: Start) -> None:
    assert start("", lambda: None) is None


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    flag = tmp_path / "two words"
    flag.touch()
    assert preemption.poll(f"test -e '{flag}'", timeout=5)
    assert not preemption.poll("test -e $HOME", timeout=5)
    assert not preemption.poll(f"test -e {tmp_path / 'none'} || true", timeout=5)


@pytest.mark.parametrize(
    ("command", "error"),
    [("/nowhere/to/be/found", "cannot be started"), ("test 'unclosed", "cannot be started"), ("sleep 60", "within")],
)
def test_a_command_that_does_not_answer_is_told_of_once_and_tried_on(start: Start, command: str, error: str) -> None:
    with capture_logs() as logs:
        start(command, lambda: pytest.fail("drained without a notice"))
        until(lambda: bool(logs))
        time.sleep(0.3)  # five more tries
    failures = [line["error"] for line in logs if line["event"] == "notice.failed"]
    assert len(failures) == 1
    assert error in failures[0]


def test_a_command_that_works_again_may_still_bring_the_notice(start: Start, tmp_path: Path) -> None:
    command, drained = tmp_path / "spot", Event()
    start(str(command), drained.set)
    (tmp_path / "new").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "new").chmod(0o755)
    (tmp_path / "new").rename(command)
    assert drained.wait(10)


def test_a_late_command_ends_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(preemption.Failed, match="did not end within"):
        preemption.poll(shlex.join(["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"]), timeout=1)
    until(lambda: gone(int(pid.read_text())))


def test_an_answer_counts_although_a_child_keeps_the_pipe_open() -> None:
    assert preemption.poll("sh -c 'sleep 60 & exit 0'", timeout=0.5)
    assert not preemption.poll("sh -c 'sleep 60 & exit 3'", timeout=0.5)


def test_what_it_says_goes_to_the_log_and_not_further(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('said ' + sys.stdin.read()); print('x' * 1_000_000); print('last', file=sys.stderr)"
    structlog.reset_defaults()  # a test before may have raised the level
    with capture_logs() as logs:
        assert preemption.poll(shlex.join([sys.executable, "-c", code]), timeout=20)
    assert [(line["log_level"], line["code"]) for line in logs] == [("debug", 0)]
    assert len(logs[0]["said"]) <= preemption.SHOWN
    assert capfd.readouterr() == ("", "")


def test_a_command_gets_no_setting_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLINER_S3_SECRET_KEY", "s3cret")
    monkeypatch.setenv("no_proxy", "169.254.169.254")
    structlog.reset_defaults()
    with capture_logs() as logs:
        assert preemption.poll("env", timeout=5)
    assert "no_proxy=169.254.169.254\n" in logs[0]["said"]
    assert "MILLINER_" not in logs[0]["said"]


def gone(pid: int) -> bool:
    """Dead, whether or not somebody has reaped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(holds: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
