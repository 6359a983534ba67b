"""Notice that this machine will be taken away: a command of the operator's, asked again and again.

Clouds announce the end of a spot machine in ways of their own, each a line of shell. Exit code 0 of `notice_command`
says that the end is near; any other that it is not. Must not know what draining is.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from threading import Event, Thread

from shared import linux
from shared.settings import Settings, get_settings
from shared.telemetry import log

#: Of our own environment, which holds secrets, a command gets no more.
PASSED_ON = (*linux.BASIC, *linux.PROXIES, "HOME")
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
    env = linux.inherited(*PASSED_ON)
    try:
        asked = linux.run(shlex.split(command), env=env, timeout=timeout, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as late:
        log.debug("notice.asked", code=None, said=_end_of(late.output or b""))
        raise Failed(f"did not end within {timeout:g} s") from late
    except (OSError, ValueError) as error:  # ValueError: a quotation mark is missing
        raise Failed(f"cannot be started: {error}") from error
    log.debug("notice.asked", code=asked.returncode, said=_end_of(asked.stdout))
    return asked.returncode == 0


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


def _end_of(said: bytes) -> str:
    return said[-SHOWN:].decode(errors="replace")
