"""One child process of the supervisor, and how it is bound to it.

Owns: starting a program with its log, and ending it. A child never outlives the supervisor (PDEATHSIG), is alone in its
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
    """Under which user a program runs. PostgreSQL refuses to run as root."""

    SELF = "self"
    NAMESPACE = "namespace"  # root outside, uid 1000 inside a user namespace: files keep their owner
    NOBODY = "nobody"  # where user namespaces are forbidden


@dataclass(frozen=True)
class Program:
    """What to run; `grace` is the time between `stop_signal` and SIGKILL, in seconds."""

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
            preexec_fn=binding(program.stop_signal, identity=program.identity),  # noqa: PLW1509 (it has one thread)
        )


def binding(death: signal.Signals, *, identity: Identity = Identity.SELF) -> Callable[[], None]:
    """What a child does between fork and exec: become `identity`, and get the signal `death` when this process ends.

    The signal comes last: a change of credentials clears it.
    """
    parent = os.getpid()

    def bind() -> None:
        if identity is Identity.NAMESPACE:
            _enter_namespace()
        elif identity is Identity.NOBODY:
            nobody = pwd.getpwnam("nobody")
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
        kill_when_parent_dies(parent, by=death)

    return bind


def stop(child: subprocess.Popen[bytes], program: Program) -> None:
    """Ask a child to end; `end` waits for it."""
    if child.poll() is None:
        child.send_signal(program.stop_signal)


def end(child: subprocess.Popen[bytes], program: Program, *, asked_at: float) -> None:
    """Wait until the grace of a child that was asked at `asked_at` (monotonic) is over, then kill its whole group."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(max(0.0, asked_at + program.grace - time.monotonic()))
    kill_group(child)
    child.wait()


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 16_384))
        return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])


def open_files(pid: int) -> set[str]:
    """What a process's descriptors point to, such as "/a/file" or "socket:[8413]"; nothing if it has ended."""
    found = set()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(entry))
    return found


def kill_holders(path: Path) -> None:
    """Kill every process but this one that has `path` open."""
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        if pid != os.getpid() and str(path) in open_files(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@lru_cache(maxsize=1)
def unprivileged() -> Identity:
    """The way to not be root here."""
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
    """Appear as uid 1000 while remaining, for the files outside, the user that we are (user_namespaces(7))."""
    uid, gid = os.geteuid(), os.getegid()
    if _LIBC.unshare(_CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWUSER) failed")
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as out:
            out.write(text)
