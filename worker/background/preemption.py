"""Detect that the cloud will take this machine away, by polling a command that the operator configured.

Each cloud announces the end of a spot machine in its own way, usually readable with one shell command. Exit code 0 of
`notice_command` means that the machine will be taken away; any other code that it will not.

Owns: running the command. Must not know how a worker drains.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from threading import Event, Thread

from shared import linux
from shared.settings import Settings, get_settings
from shared.telemetry import log

#: All of our environment that the command gets: the rest holds secrets.
PASSED_ON = (*linux.BASIC, *linux.PROXIES, "HOME")
LOGGED_BYTES = 2000


class Failed(Exception):
    """The command did not start or did not end in time."""


def start(stop: Event, drain: Callable[[], None]) -> Thread | None:
    """Poll until `stop` is set or a notice is found, then call `drain` once. None if no command is configured."""
    settings = get_settings()
    if not settings.notice_command:
        return None
    thread = Thread(
        target=_keep_polling, args=(stop, drain, settings.notice_command, settings), name="notice", daemon=True
    )
    thread.start()
    return thread


def poll(command: str, *, timeout: float) -> bool:
    """Run the command without a shell, and return whether its exit code is 0. Raises `Failed` after `timeout` seconds.

    The command gets its own process group: processes that it started are killed with it and cannot block this one.
    """
    env = linux.inherited(*PASSED_ON)
    try:
        done = linux.run(shlex.split(command), env=env, timeout=timeout, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as late:
        log.debug("notice.polled", code=None, output=_tail(late.output or b""))
        raise Failed(f"did not end within {timeout:g} s") from late
    except (OSError, ValueError) as error:  # ValueError: a quotation mark is missing
        raise Failed(f"cannot be started: {error}") from error
    log.debug("notice.polled", code=done.returncode, output=_tail(done.stdout))
    return done.returncode == 0


def _keep_polling(stop: Event, drain: Callable[[], None], command: str, settings: Settings) -> None:
    last_error = ""
    while not stop.is_set():
        try:
            found, error = poll(command, timeout=settings.notice_seconds), ""
        except Failed as failed:
            found, error = False, str(failed)
        if error not in ("", last_error):  # log each error once, not at every poll
            log.error("notice.failed", command=command, error=error)
        last_error = error
        if found:
            log.warning("notice.received", command=command)
            drain()
            return
        stop.wait(settings.notice_seconds)


def _tail(output: bytes) -> str:
    return output[-LOGGED_BYTES:].decode(errors="replace")
