"""The trainer child: `python -m worker.trainer.main [PARENT_PID]`, commands on stdin, events on stdout.

Owns: the pipe, the process's life, and turning exceptions into `failed`. It is a session: the base model stays resident
between jobs on the same base. Must hold no secret and reach no network; training itself lives in `train.py`.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING

# Before anything of Hugging Face is imported: these are read at import. The parent scrubs the environment as well.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")

from pydantic import ValidationError

from shared.errors import TrainingFailed
from shared.protocol import COMMAND, Command, Failed, Measured, PhaseEntered, Prepare, Prepared, Stop, Train, TrainerEvent
from shared.schemas import Phase, Quantization

if TYPE_CHECKING:
    from worker.trainer.model import Base

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Serve commands until stdin ends."""
    die_with_parent(int(argv[0]) if argv else os.getppid())
    session = Session(claim_stdout())
    threading.Thread(target=session.read, name="commands", daemon=True).start()
    while (command := session.commands.get()) is not None:
        session.serve(command)
    return 0


def die_with_parent(parent: int) -> None:
    """SIGKILL for us when the supervisor's thread that started us ends: an orphan would train for nobody.

    PDEATHSIG is only armed from here on, hence the look at whether the parent is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def claim_stdout() -> int:
    """The pipe for ourselves; whatever a library prints to stdout goes to stderr."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return pipe


class Session:
    """The pipe's two ends and the base that is resident."""

    def __init__(self, pipe: int) -> None:
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._pipe = os.fdopen(pipe, "wb", buffering=0)
        self._stopping: set[str] = set()
        self._resident: tuple[tuple[str, Quantization], Base] | None = None
        self._step: int | None = None

    def read(self) -> None:
        """Runs in a thread of its own, so that a stop is seen between two optimizer steps."""
        for line in sys.stdin.buffer:
            try:
                command = COMMAND.validate_json(line)
            except ValidationError as error:
                sys.stderr.write(f"not a command: {error}\n")
                os._exit(2)
            if isinstance(command, Stop):
                self._stopping.add(command.job)
            else:
                self.commands.put(command)
        self.commands.put(None)

    def emit(self, event: TrainerEvent) -> None:
        if isinstance(event, Measured):
            self._step = event.metrics.step
        self._pipe.write(event.model_dump_json(exclude_none=True).encode() + b"\n")

    def serve(self, command: Prepare | Train) -> None:
        """Answer one command; no exception of a job ends the session."""
        self._step = None
        try:
            self._prepare(command) if isinstance(command, Prepare) else self._train(command)
        except TrainingFailed as error:
            self._fail(command, error.code, error.message, hint=error.hint, param=error.param)
        except MemoryError as error:
            self._out_of_memory(command, error)
        except Exception as error:
            if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError") or "can't allocate memory" in str(error):
                self._out_of_memory(command, error)
            else:
                traceback.print_exc()
                self._fail(command, "internal_error", f"{type(error).__name__}: {error}", retryable=True)
        finally:
            self._stopping.discard(command.job)
