"""A trainer child process, seen from its parent: commands out, events in, and signals.

Owns: how the child is started (minimal environment, own process group, no secret), frozen, thawed and killed, and how
its events are read. Its stderr goes to a log file in its folder, whose last lines explain a crash. Must not know jobs'
rows.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from pydantic import ValidationError

from shared import linux
from shared.allocator import preload
from shared.settings import get_settings
from shared.telemetry import log
from worker.trainer.protocol import EVENT, Alive, Command, TrainerEvent

PASSED_ON = (*linux.BASIC, "HOME", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class Ended(Exception):
    """The child ended without a final event, or sent an invalid line."""


class Died(Ended):
    """The child ended. `signal` is the one that killed it; `out_of_memory`: the kernel killed it for its memory."""

    def __init__(self, returncode: int, *, out_of_memory: bool) -> None:
        self.signal = signal.Signals(-returncode).name if returncode < 0 else None
        self.out_of_memory = out_of_memory and self.signal == "SIGKILL"
        cause = f"was killed by {self.signal}" if self.signal else f"ended with exit code {returncode}"
        if self.out_of_memory:
            cause += ": the machine, or this container, was out of memory"
        elif self.signal == "SIGKILL" or returncode == 137:
            cause += "; 137 or SIGKILL from outside usually means out of memory"
        super().__init__(f"the trainer {cause}")


class TrainerProcess:
    """One trainer process, with `folder` as its working directory.

    Any thread may signal its process group; only one may read events.
    """

    def __init__(self, folder: Path, *, visible_device: str) -> None:
        self.visible_device = visible_device
        self._log = folder / "trainer.log"
        own = {"HF_HOME": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": visible_device}
        env = linux.inherited(*PASSED_ON) | OFFLINE | preload() | own
        configured = get_settings().trainer_command
        command = shlex.split(configured) if configured else [sys.executable, "-m", "worker.trainer.main"]
        self._log_start, self._oom_kills = 0, linux.oom_kill_count()
        with self._log.open("ab") as stderr:
            self._process = linux.spawn([*command, str(os.getpid())], env=env, stderr=stderr, cwd=folder)
        self._lines: SimpleQueue[tuple[bytes | None, float]] = SimpleQueue()
        self.received_at = 0.0  # when the last received event came out of the pipe (monotonic seconds)
        self._signal_lock, self._send_lock = Lock(), Lock()
        self.frozen = False
        Thread(target=self._read, name="trainer-events", daemon=True).start()

    def begin(self) -> None:
        """Start new work: ignore what the log and the kernel's counter hold from earlier work."""
        self._log_start, self._oom_kills = self._log.stat().st_size, linux.oom_kill_count()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def send(self, command: Command) -> None:
        """Write one command, from any thread. If the child has ended, `receive` raises."""
        assert self._process.stdin is not None
        try:
            with self._send_lock:
                self._process.stdin.write(command.model_dump_json().encode() + b"\n")
                self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # ValueError: closed on our side
            log.warning("trainer.pipe_closed", pid=self.pid)

    def send_alive(self, job: str) -> None:
        """Send `alive` unless the pipe is full: a child that does not read must not block the lease's thread."""
        assert self._process.stdin is not None
        if not self._send_lock.acquire(blocking=False):
            return
        try:
            if select.select([], [self._process.stdin], [], 0)[1]:
                os.write(self._process.stdin.fileno(), Alive(job=job).model_dump_json().encode() + b"\n")
        except (OSError, ValueError):  # ValueError: closed on our side
            log.debug("trainer.pipe_closed", pid=self.pid)
        finally:
            self._send_lock.release()

    def receive(self, *, timeout: float) -> TrainerEvent | None:
        """Return the next event, or None after `timeout` seconds.

        Raises `Died` once the child has ended and all its events are read. An invalid line kills the child and raises
        `Ended`: it may have been the final event.
        """
        try:
            line, self.received_at = self._lines.get(timeout=timeout)
        except Empty:
            return None
        if line is None:
            raise Died(self._reap(), out_of_memory=linux.oom_kill_count() > self._oom_kills)
        try:
            return EVENT.validate_json(line)
        except ValidationError as error:
            self.kill()
            shown = line[:200].decode(errors="replace")
            raise Ended(f"the trainer sent an invalid event: {shown!r} ({error.error_count()} errors)") from error

    def freeze(self) -> None:
        """Send SIGSTOP to the group: without a lease nothing may be trained."""
        self.frozen = self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Send SIGCONT to the group: the lease is valid again."""
        self._signal(signal.SIGCONT)
        self.frozen = False

    def is_stopped(self) -> bool:
        """Return whether the child is stopped: by us, by itself, or by anyone else."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    def kill(self) -> None:
        """Send SIGKILL to the group; safe to repeat."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """End the child and reap it."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                log.debug("trainer.pipe_closed", pid=self.pid)

    def last_log_lines(self, count: int = 20) -> list[str]:
        """Return the last lines that the child wrote to stderr since `begin`."""
        with self._log.open("rb") as stream:
            stream.seek(max(self._log_start, self._log.stat().st_size - 64 * 1024))
            lines = deque(stream, maxlen=count)
        return [line.decode(errors="replace").replace("\0", "").rstrip() for line in lines]

    def _reap(self) -> int:
        """Return the exit code of a child that has closed its stdout; kill it if it does not end within 5 s."""
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def _signal(self, number: signal.Signals) -> bool:
        with self._signal_lock:
            return self._process.poll() is None and linux.signal_group(self._process, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put((line, time.monotonic()))
        self._lines.put((None, time.monotonic()))
