"""What we ask of Linux: to start, bind and end child processes, to tell the time since boot, and what our cgroup says.

Owns: system calls and kernel files that the standard library does not wrap, and which environment a child gets: its
own, never the whole of ours. The trainer uses it too, so it must not import anything of ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

#: What a program needs to start as its parent did, for `inherited`. Python's search path is part of it: a child of ours
#: runs the code that its parent runs.
BASIC = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")
#: What it needs besides to reach a server outside.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


# ---------------------------------------------------------------- children


def inherited(*names: str) -> dict[str, str]:
    """Those of the named environment variables that are set: the start of a child's environment, built from nothing."""
    return {name: os.environ[name] for name in names if name in os.environ}


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    stderr: int | IO[bytes],
    stdin: int | IO[bytes] = subprocess.PIPE,
    stdout: int | IO[bytes] = subprocess.PIPE,
    cwd: Path | None = None,
    new_session: bool = True,
) -> subprocess.Popen[bytes]:
    """Start a program that has no other environment than `env`. Raises OSError if it cannot be executed (execve(2)).

    It leads a session and a process group of its own (setsid(2)): a terminal's Ctrl-C does not reach it, and
    `signal_group` reaches it with all that it starts. Without `new_session` it stays in our group, and is stopped and
    killed with us. Streams are as in `subprocess.Popen`.
    """
    return subprocess.Popen(
        argv, env=env, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, start_new_session=new_session
    )


def run(
    argv: Sequence[str], *, env: Mapping[str, str], timeout: float | None = None, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    """`spawn` a program that reads nothing, and collect what it says. Its group is killed after `timeout` seconds.

    Raises OSError if it cannot be executed, and `subprocess.TimeoutExpired` if it did not end in time. One that did,
    but whose own child held its pipes open until then, has its exit code all the same. `stderr` may be
    `subprocess.STDOUT`, to have both in order.
    """
    with spawn(argv, env=env, stdin=subprocess.DEVNULL, stderr=stderr) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as expired:
            kill_group(child)
            if child.wait() == -signal.SIGKILL:
                raise
            out, err = expired.output or b"", expired.stderr or b""
        except BaseException:
            kill_group(child)
            raise
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def signal_group(leader: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Send a signal to the process group that a child leads; False if nobody is left in it (killpg(3)).

    Call it before the child is reaped where that can be: then its id cannot be another's yet.
    """
    try:
        os.killpg(leader.pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_group(leader: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a child and all that it has started and left in its group; safe to repeat."""
    signal_group(leader, signal.SIGKILL)


def wait_or_kill(leader: subprocess.Popen[bytes], *, seconds: float) -> bool:
    """Reap a child, and kill its group if it has not ended within `seconds`. True if it ended by itself."""
    try:
        leader.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_group(leader)
        leader.wait()
        return False
    return True


def kill_when_parent_dies(parent: int, *, by: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for the signal `by` as soon as the thread that started us ends (prctl(2), PR_SET_PDEATHSIG).

    It holds from here on, through execve(2) but not through a change of credentials, and not for our own children.
    `parent` is the id of the process that started us: raises ProcessLookupError if that has ended before, and OSError
    if the kernel refuses. Safe between fork and exec.
    """
    number, none = ctypes.c_ulong(by), ctypes.c_ulong(0)
    if _LIBC.prctl(_PR_SET_PDEATHSIG, number, none, none, none) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise ProcessLookupError(f"the parent is gone: process {parent} has ended")


# ---------------------------------------------------------------- the machine


def boot_time() -> float:
    """Seconds since boot, those included that the machine slept (CLOCK_BOOTTIME, clock_gettime(2)).

    The same in every process of this machine, and turned by nobody.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def memory_limit(*, proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes of memory that our cgroup may take; None where nothing limits it, or cgroup v2 is not mounted.

    The lowest `memory.max` of the group and those above it: each binds. Raises OSError if `proc` is not there.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    limits = [path.read_text(encoding="ascii").strip() for path in _own_files("memory.max", proc, cgroups)]
    return min((int(limit) for limit in limits if limit != "max"), default=None)


def oom_kill_count(*, proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """How many processes the kernel has killed for want of memory: in our cgroup, or where that has no counter, here.

    The counter is `oom_kill` of the nearest `memory.events` (cgroup v2), which counts the groups below too, or of
    `/proc/vmstat`. It only grows: compare two readings. Raises OSError if `proc` is not there.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    counters = next(_own_files("memory.events", proc, cgroups), proc / "vmstat")
    if not counters.is_file():
        return 0
    lines = (line.split() for line in counters.read_text(encoding="ascii").splitlines())
    return next((int(count) for name, count in lines if name == "oom_kill"), 0)


def _own_files(name: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """The file of that name in our cgroup (v2) and in each one above, the nearest first, where there is one.

    Our group is the line `0::/a/b` of `/proc/self/cgroup` (cgroups(7)). In a container that is often `0::/`: the files
    are at the top of the mount then.
    """
    lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    folder = cgroups / own
    for group in (folder, *folder.parents):
        if group.is_relative_to(cgroups) and (group / name).is_file():
            yield group / name
