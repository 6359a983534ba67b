"""Notice that this machine will be taken away: a command of the operator's, asked again and again.

Clouds announce the end of a spot machine in ways of their own, each a line of shell. Exit code 0 of `notice_command`
says that the end is near; any other that it is not. Must not know what draining is.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from threading import Event, Thread

from shared.settings import Settings, get_settings
from shared.telemetry import log

SHOWN = 2000


class Failed(Exception):
    """The command gave no answer."""


def start(stop: Event, drain: Callable[[], None]) -> Thread | None:
    """Ask until `stop` is set or the answer is yes, then call `drain` once; None where there is nothing to ask."""
    settings = get_settings()
    if not settings.notice_command:
        return None
    thread = Thread(target=_watching, args=(stop, drain, settings.notice_command, settings), name="notice", daemon=True)
    thread.start()
    return thread


def poll(command: str, *, timeout: float) -> bool:
    """Run the command, without a shell and for `timeout` seconds at most; `Failed` if it did not answer.

    It gets a process group of its own: whatever it started ends with it, and holds up nothing here.
    """
    try:
        process = subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # ValueError: a quotation mark is missing
        raise Failed(f"cannot be started: {error}") from error
    with process:
        late = False
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as expired:
            os.killpg(process.pid, signal.SIGKILL)
            said = expired.output or b""
            late = process.wait() == -signal.SIGKILL  # else it had ended, and only a child of its own held the pipe
    log.debug("notice.asked", code=process.returncode, said=said[-SHOWN:].decode(errors="replace"))
    if late:
        raise Failed(f"did not end within {timeout:g} s")
    return process.returncode == 0


def _watching(stop: Event, drain: Callable[[], None], command: str, settings: Settings) -> None:
    trouble = ""
    while not stop.is_set():
        try:
            taken, now = poll(command, timeout=settings.notice_seconds), ""
        except Failed as failed:
            taken, now = False, str(failed)
        if now not in ("", trouble):  # once, and not every few seconds
            log.error("notice.failed", command=command, error=now)
        trouble = now
        if taken:
            log.warning("notice.received", command=command)
            drain()
            return
        stop.wait(settings.notice_seconds)
