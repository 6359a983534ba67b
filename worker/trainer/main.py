"""The trainer child: `python -m worker.trainer.main [PARENT_PID]` reads commands on stdin and writes events to stdout.

The base model stays loaded between jobs on the same base. Training itself is in `training/loop.py`.
Owns: the pipe, the life of the process, and turning exceptions into `Failed` events. Must hold no secret and use no
network.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

# Set before Hugging Face's libraries and torch's thread pool are imported, because they read these variables then. The
# parent removes secrets from the environment as well. GOMP_SPINCOUNT: a waiting thread spins for this many rounds and
# then sleeps. The default, 300,000, takes the cores from other processes; not spinning at all
# (OMP_WAIT_POLICY=PASSIVE) is slower on an idle machine.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
# TORCHDYNAMO_DISABLE: on import, bitsandbytes wraps functions in torch.compile, which imports a compiler that nothing
# here uses. That takes 1.4 of the 6.4 CPU seconds of all imports.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from pydantic import ValidationError

from shared.errors import TrainingFailed
from shared.linux import boot_time, kill_when_parent_dies
from shared.schemas.requests import Phase, Quantization
from shared.streams import protect_standard_streams
from worker.trainer.protocol import (
    COMMAND,
    Alive,
    Failed,
    MakeExport,
    Measured,
    PhaseEntered,
    Prepare,
    Prepared,
    Preview,
    Previewed,
    Stop,
    Train,
    TrainerEvent,
    Verify,
    Working,
)
from worker.trainer.system.resource_errors import is_disk_full, is_out_of_memory

if TYPE_CHECKING:
    from worker.trainer.model.base import Base

#: Commands that are queued and run one at a time.
Work = Prepare | Preview | Train | Verify | MakeExport

#: Seconds without an event after which progress is reported by a `Working` event.
WORKING_SECONDS = 5.0


def main(argv: list[str]) -> int:
    """Serve commands until stdin ends."""
    try:
        kill_when_parent_dies(int(argv[0]) if argv else os.getppid())  # nobody would use an orphan's results
    except ProcessLookupError as error:
        sys.exit(str(error))
    session = CommandLoop(claim_stdout())
    threading.Thread(target=session.read, name="commands", daemon=True).start()
    while (command := session.commands.get()) is not None:
        session.serve(command)
    return 0


def claim_stdout() -> BinaryIO:
    """Return stdout for events only. What libraries print to stdout goes to stderr, and a failing stderr is ignored.

    The pipe is buffered: a SIGSTOP can cut a write to a full pipe short, and a buffered writer writes the rest.
    """
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    protect_standard_streams()
    return pipe


class CommandLoop:
    """Run commands and emit events, keeping the last base model loaded."""

    def __init__(self, pipe: BinaryIO) -> None:
        self.commands: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._pipe = pipe
        self._emitted_at = time.monotonic()
        self._stopping: set[str] = set()
        self._resident: tuple[tuple[str, Quantization, tuple[str, ...] | None], Base] | None = None
        self._step: int | None = None
        self._silence_limit: float | None = None
        self._watched = False
        self._alive_at = boot_time()
        self._freezing = threading.Lock()

    def read(self) -> None:
        """Read commands until stdin ends. Runs in its own thread, so that a stop is seen during an optimizer step."""
        for line in sys.stdin.buffer:
            try:
                command = COMMAND.validate_json(line)
            except ValidationError as error:
                sys.stderr.write(f"not a command: {error}\n")
                os._exit(2)
            if isinstance(command, Alive):
                self.freeze_if_silent()  # first: after a SIGSTOP, this message may have waited in the pipe all the time
                self._alive_at = boot_time()
            elif isinstance(command, Stop):
                self._stopping.add(command.job)
            else:
                # The pipe keeps order: a stop that was sent before this command belongs to an earlier one.
                self._stopping.discard(command.job)
                self.commands.put(command)
        self.commands.put(None)

    def watch(self, limit: float) -> None:
        """Check for silence regularly. Runs in its own thread: the main one may be in a long kernel."""
        while True:
            time.sleep(limit / 4)
            self.freeze_if_silent()

    def limit_silence(self, seconds: float | None) -> None:
        """From now on, freeze this process after so many seconds without an `Alive`; None: never."""
        if seconds is not None and not self._watched:
            self._watched = True
            threading.Thread(target=self.watch, args=(seconds,), name="watch", daemon=True).start()
        with self._freezing:
            self._alive_at, self._silence_limit = boot_time(), seconds

    def freeze_if_silent(self) -> None:
        """Stop this process if the supervisor is silent: it may have lost the lease. The supervisor resumes it.

        Each thread calls this before it has an effect: after SIGCONT, any thread may be the first to run. An idle child
        receives no `Alive` and has no limit.
        """
        with self._freezing:
            if self._silence_limit is not None and boot_time() - self._alive_at > self._silence_limit:
                # Sent to this thread, which then stops at this line; a signal to the process may reach any thread.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
                self._alive_at = boot_time()

    def emit(self, event: TrainerEvent) -> None:
        """Write the event as one whole line. Only the thread that runs commands may call it."""
        if isinstance(event, Measured):
            self._step = event.metrics.step
        line = event.model_dump_json().encode() + b"\n"
        self.freeze_if_silent()
        self._pipe.write(line)
        self._pipe.flush()
        self._emitted_at = time.monotonic()

    def tick(self, job: str) -> None:
        """Report progress if nothing was emitted for a while. Called for each unit of work, even a single row."""
        if time.monotonic() - self._emitted_at >= WORKING_SECONDS:
            self.emit(Working(job=job))

    def serve(self, command: Work) -> None:
        """Run one command. An exception becomes a `Failed` event and does not end the process."""
        self._step = None
        self.limit_silence(command.task.silence_seconds)
        try:
            match command:
                case Prepare():
                    self._prepare(command)
                case Preview():
                    self._preview(command)
                case Train():
                    self._train(command)
                case Verify():
                    self._verify(command)
                case MakeExport():
                    self._export(command)
        except TrainingFailed as error:
            self._fail(
                command, error.code, error.message, hint=error.hint, param=error.param, retryable=error.retryable
            )
        except Exception as error:
            traceback.print_exc()
            if is_out_of_memory(error):
                hint = "lower trainer.max_length or lora.r, or use quantization nf4"
                message = f"the trainer ran out of memory: {error}"
                # What was trained fits, so a `Verify` that runs out of memory is short of it only at the moment.
                self._fail(command, "out_of_memory", message, hint=hint, retryable=isinstance(command, Verify))
            elif is_disk_full(error):
                hint = "free space on the worker's disk; the job resumes from its last checkpoint"
                self._fail(command, "disk_full", f"the worker's disk is full: {error}", hint=hint, retryable=True)
            else:
                self._fail(command, "internal_error", f"{type(error).__name__}: {error}", retryable=True)
        finally:
            self._stopping.discard(command.job)
            self.limit_silence(None)

    def _prepare(self, command: Prepare) -> None:
        self.emit(PhaseEntered(job=command.job, phase=Phase.TOKENIZING))
        # Imported here: transformers takes seconds to import, and the pipe must answer at once.
        from worker.trainer.planning.prepare import prepare  # noqa: PLC0415 (import cost)

        plan = prepare(command.task, tick=lambda: self.tick(command.job))
        self.emit(Prepared(job=command.job, plan=plan))

    def _preview(self, command: Preview) -> None:
        # Imported here: transformers takes seconds to import, and the pipe must answer at once.
        from worker.trainer.planning.preview import preview  # noqa: PLC0415 (import cost)

        self.emit(Previewed(job=command.job, preview=preview(command, tick=lambda: self.tick(command.job))))

    def _train(self, command: Train) -> None:
        # Imported here: peft and bitsandbytes take more seconds, and `prepare` does not need them.
        from worker.trainer.training.loop import train  # noqa: PLC0415 (import cost)

        labels = command.recipe.labels
        key = (command.task.base_dir, command.recipe.quantization, tuple(labels) if labels else None)
        if self._resident is not None and self._resident[0] != key:
            self._resident = None  # two bases may not fit; and this run's memory is measured from here on
            self._free_memory()
        train(
            command,
            lambda: self._base(*key),
            emit=self.emit,
            stopping=lambda: self._is_stopping(command.job),
            tick=lambda: self.tick(command.job),
        )
        self._free_memory()

    def _verify(self, command: Verify) -> None:
        from worker.trainer.artifact.verify import verify  # noqa: PLC0415 (import cost)

        stopping, tick = partial(self._is_stopping, command.job), partial(self.tick, command.job)
        self.emit(verify(command, stopping=stopping, tick=tick))
        self._free_memory()

    def _export(self, command: MakeExport) -> None:
        from worker.trainer.exports.make import export  # noqa: PLC0415 (import cost)

        stopping, tick = partial(self._is_stopping, command.job), partial(self.tick, command.job)
        self.emit(export(command, stopping=stopping, tick=tick))

    def _free_memory(self) -> None:
        """Return unused memory to the machine: others may need it while this process waits for its next command."""
        from worker.trainer.system import free_memory  # noqa: PLC0415 (import cost)

        free_memory.free()

    def _is_stopping(self, job: str) -> bool:
        """Whether a stop was requested.

        Called before each micro-batch, and so also checks for silence and reports progress.
        """
        self.freeze_if_silent()
        self.tick(job)
        return job in self._stopping

    def _base(self, base_dir: str, quantization: Quantization, labels: tuple[str, ...] | None) -> Base:
        """The base model in memory, loaded if there is none."""
        from worker.trainer.model.base import load_base  # noqa: PLC0415 (import cost)

        if self._resident is None:
            self._resident = (base_dir, quantization, labels), load_base(base_dir, quantization, labels=labels)
        return self._resident[1]

    def _fail(
        self,
        command: Work,
        code: str,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        retryable: bool = False,
    ) -> None:
        self.emit(
            Failed(
                job=command.job,
                code=code,
                message=message,
                hint=hint,
                param=param,
                step=self._step,
                retryable=retryable,
            )
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
