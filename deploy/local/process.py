"""Start and stop one child process of the supervisor.

Owns: starting a program with its log, and ending it. A child never outlives the supervisor (PDEATHSIG), has its own
process group (a terminal's Ctrl-C reaches only the supervisor), and inherits one descriptor, that of `children.lock`.
Must not know what the programs are. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from shared.linux import kill_group, kill_when_parent_dies

_CLONE_NEWUSER = 0x10000000
_LOG_BYTES = 10 * 1024**2
_LIBC = ctypes.CDLL(None, use_errno=True)  # for unshare(2), which `os` has from Python 3.12 on


class Identity(StrEnum):
    """The user that a program runs as. PostgreSQL refuses to run as root."""

    SELF = "self"
    NAMESPACE = "namespace"  # root outside, uid 1000 inside a user namespace: files keep their owner
    NOBODY = "nobody"  # for systems that forbid user namespaces


@dataclass(frozen=True)
class Program:
    """A program to run. `grace` is the time between `stop_signal` and SIGKILL, in seconds."""

    name: str
    argv: list[str]
    env: dict[str, str]
    cwd: Path
    stop_signal: signal.Signals = signal.SIGTERM
    grace: float = 10.0
    identity: Identity = Identity.SELF


def spawn(program: Program, *, log: Path, inherit: int) -> subprocess.Popen[bytes]:
    """Start a program with its output in `log`. Call it from the main thread: PDEATHSIG follows the calling thread."""
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as out:
        return subprocess.Popen(
            program.argv,
            env=program.env,
            cwd=program.cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=(inherit,),
            process_group=0,
            umask=0o077,
            preexec_fn=preparation(program.stop_signal, identity=program.identity),  # noqa: PLW1509 (it has one thread)
        )


def preparation(death: signal.Signals, *, identity: Identity = Identity.SELF) -> Callable[[], None]:
    """Return what a child runs between fork and exec: become `identity`, and get signal `death` when this process ends.

    The signal is set last, because a change of credentials clears it.
    """
    parent = os.getpid()

    def prepare() -> None:
        if identity is Identity.NAMESPACE:
            _enter_namespace()
        elif identity is Identity.NOBODY:
            nobody = pwd.getpwnam("nobody")
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
        kill_when_parent_dies(parent, by=death)

    return prepare


def stop(child: subprocess.Popen[bytes], program: Program) -> None:
    """Send a child its stop signal; `end` waits for it."""
    if child.poll() is None:
        child.send_signal(program.stop_signal)


def end(child: subprocess.Popen[bytes], program: Program, *, asked_at: float) -> None:
    """Wait until `grace` seconds after `asked_at` (monotonic) for a child to end, then kill its process group."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(max(0.0, asked_at + program.grace - time.monotonic()))
    kill_group(child)
    child.wait()


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log, for an error message."""
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 16_384))
        return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])


def open_files(pid: int) -> set[str]:
    """Return what a process has open, such as "/a/file" or "socket:[8413]"; an empty set if it has ended."""
    found = set()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(entry))
    return found


def kill_holders(path: Path) -> None:
    """Kill every other process that has `path` open."""
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        if pid != os.getpid() and str(path) in open_files(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@lru_cache(maxsize=1)
def unprivileged() -> Identity:
    """Return an identity that is not root on this system."""
    if os.geteuid() != 0:
        return Identity.SELF
    pid = os.fork()
    if pid == 0:
        try:
            _enter_namespace()
        except OSError:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return Identity.NAMESPACE if os.waitstatus_to_exitcode(status) == 0 else Identity.NOBODY


def _enter_namespace() -> None:
    """Become uid 1000 in a user namespace; outside it, files still belong to the current user (user_namespaces(7))."""
    uid, gid = os.geteuid(), os.getegid()
    if _LIBC.unshare(_CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWUSER) failed")
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as out:
            out.write(text)
