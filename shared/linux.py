"""Linux: start and end child processes, read the time since boot, and read the memory limits of our cgroup.

Owns: system calls and kernel files that the standard library does not wrap, and the environment of child processes: it
is built from named variables, never copied from ours. The trainer uses this module too, so it must not import other
modules of this repository.
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

#: For `inherited`: what a program needs to start as its parent did. PYTHONPATH is included, so that a child process
#: runs the same code as its parent.
BASIC = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")
#: For `inherited`: what a program also needs to reach a server on the internet.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


# ---------------------------------------------------------------- children


def inherited(*names: str) -> dict[str, str]:
    """Return those of the named environment variables that are set: a start for the environment of a child process."""
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
    """Start a program whose whole environment is `env`. Raises OSError if it cannot be executed (execve(2)).

    It leads a new session and process group (setsid(2)): Ctrl-C in a terminal does not reach it, and `signal_group`
    signals it together with all that it starts. Without `new_session` it stays in our process group, and is stopped and
    killed together with us. Streams are as in `subprocess.Popen`.
    """
    return subprocess.Popen(
        argv, env=env, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, start_new_session=new_session
    )


def run(
    argv: Sequence[str], *, env: Mapping[str, str], timeout: float | None = None, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    """Run a program without input, and return its exit code and output. Its group is killed after `timeout` seconds.

    Raises OSError if it cannot be executed, and `subprocess.TimeoutExpired` if it does not end in time. If it ends in
    time but a child of its own keeps the pipes open until the timeout, its exit code and output are returned. `stderr`
    may be `subprocess.STDOUT`, to get both outputs in order.
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
    """Send a signal to the process group that a child leads; False if no process is left in it (killpg(3)).

    If possible, call it before the child is reaped: until then no other process can get its id.
    """
    try:
        os.killpg(leader.pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_group(leader: subprocess.Popen[bytes]) -> None:
    """Kill (SIGKILL) a child and every process in its group. It may be called again."""
    signal_group(leader, signal.SIGKILL)


def wait_or_kill(leader: subprocess.Popen[bytes], *, seconds: float) -> bool:
    """Wait for a child, and kill its group if it has not ended within `seconds`. True if it ended by itself."""
    try:
        leader.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_group(leader)
        leader.wait()
        return False
    return True


def kill_when_parent_dies(parent: int, *, by: signal.Signals = signal.SIGKILL) -> None:
    """Make the kernel send us the signal `by` when the thread that started us ends (prctl(2), PR_SET_PDEATHSIG).

    The setting survives execve(2), but not a change of credentials, and our own children do not inherit it. `parent` is
    the id of the process that started us. Raises ProcessLookupError if that has already ended, and OSError if the
    kernel refuses. Safe between fork and exec.
    """
    number, none = ctypes.c_ulong(by), ctypes.c_ulong(0)
    if _LIBC.prctl(_PR_SET_PDEATHSIG, number, none, none, none) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise ProcessLookupError(f"the parent is gone: process {parent} has ended")


# ---------------------------------------------------------------- the machine


def boot_time() -> float:
    """Seconds since boot, including the time that the machine slept (CLOCK_BOOTTIME, clock_gettime(2)).

    The same in every process of this machine. Unlike the wall clock it is never set.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def memory_limit(*, proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """The memory limit of our cgroup in bytes; None if there is no limit, or cgroup v2 is not mounted.

    It is the lowest `memory.max` of the group and the groups above it: all of them apply. Raises OSError if `proc` does
    not exist.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    limits = [path.read_text(encoding="ascii").strip() for path in _own_files("memory.max", proc, cgroups)]
    return min((int(limit) for limit in limits if limit != "max"), default=None)


def oom_kill_count(*, proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """How many processes the kernel has killed for lack of memory: in our cgroup, or else on the whole machine.

    The counter is `oom_kill` in the nearest `memory.events` (cgroup v2), which includes the groups below, or else in
    `/proc/vmstat`. It only increases, so compare two readings. Raises OSError if `proc` does not exist.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    counters = next(_own_files("memory.events", proc, cgroups), proc / "vmstat")
    if not counters.is_file():
        return 0
    lines = (line.split() for line in counters.read_text(encoding="ascii").splitlines())
    return next((int(count) for name, count in lines if name == "oom_kill"), 0)


def _own_files(name: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the files of that name in our cgroup (v2) and in the groups above it, the nearest first.

    Our group is the line `0::/a/b` of `/proc/self/cgroup` (cgroups(7)). In a container that line is often `0::/`; then
    the files are at the top of the mount.
    """
    lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    folder = cgroups / own
    for group in (folder, *folder.parents):
        if group.is_relative_to(cgroups) and (group / name).is_file():
            yield group / name
