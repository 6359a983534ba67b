"""The trainer child: `python -m worker.trainer.main [PARENT_PID]`, commands on stdin, events on stdout.

Owns: the pipe, the process's life, and turning exceptions into `failed`. It is a session: the base model stays resident
between jobs on the same base. Must hold no secret and reach no network; training itself lives in `train.py`.
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

# Read when Hugging Face's libraries and torch's thread pool are imported, so set before. The parent scrubs the
# environment as well. GOMP_SPINCOUNT: threads that wait spin briefly and then sleep. The default, 300,000 rounds,
# starves whatever else wants a core; not spinning at all (OMP_WAIT_POLICY=PASSIVE) is slower on an idle machine.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
# TORCHDYNAMO_DISABLE: bitsandbytes wraps functions in torch.compile when it is imported, which imports a compiler that
# nothing here uses: 1.4 of the 6.4 CPU seconds that the imports take.
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

#: What the session answers one after the other.
Work = Prepare | Preview | Train | Verify | MakeExport

#: A child that has said nothing for so many seconds, and gets somewhere, says that.
WORKING_EVERY = 5.0


def main(argv: list[str]) -> int:
    """Serve commands until stdin ends."""
    try:
        kill_when_parent_dies(int(argv[0]) if argv else os.getppid())  # an orphan would train for nobody
    except ProcessLookupError as error:
        sys.exit(str(error))
    session = CommandLoop(claim_stdout())
    threading.Thread(target=session.read, name="commands", daemon=True).start()
    while (command := session.commands.get()) is not None:
        session.serve(command)
    return 0


def claim_stdout() -> BinaryIO:
    """The pipe for ourselves; whatever a library prints to stdout goes to stderr, and is written if it can be.

    Buffered, because a stop cuts a write to a full pipe short, and only a buffer goes on where that ended.
    """
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    protect_standard_streams()
    return pipe


class CommandLoop:
    """The pipe's two ends and the base that is resident."""

    def __init__(self, pipe: BinaryIO) -> None:
        self.commands: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._pipe = pipe
        self._emitted_at = time.monotonic()
        self._stopping: set[str] = set()
        self._resident: tuple[tuple[str, Quantization, tuple[str, ...] | None], Base] | None = None
        self._step: int | None = None
        self._silence: float | None = None
        self._watched = False
        self._heard = boot_time()
        self._fencing = threading.Lock()

    def read(self) -> None:
        """Runs in a thread of its own, so that a stop is seen between two optimizer steps."""
        for line in sys.stdin.buffer:
            try:
                command = COMMAND.validate_json(line)
            except ValidationError as error:
                sys.stderr.write(f"not a command: {error}\n")
                os._exit(2)
            if isinstance(command, Alive):
                self.fence()  # first: after a long stop, this one may have lain in the pipe all the time
                self._heard = boot_time()
            elif isinstance(command, Stop):
                self._stopping.add(command.job)
            else:
                self._stopping.discard(command.job)  # the pipe keeps order: a stop before its command is of another one
                self.commands.put(command)
        self.commands.put(None)

    def watch(self, silence: float) -> None:
        """Runs in a thread of its own: the training one may be long in a kernel."""
        while True:
            time.sleep(silence / 4)
            self.fence()

    def listen(self, silence: float | None) -> None:
        """From here on the supervisor is to be heard so often; None: no more."""
        if silence is not None and not self._watched:
            self._watched = True
            threading.Thread(target=self.watch, args=(silence,), name="watch", daemon=True).start()
        with self._fencing:
            self._heard, self._silence = boot_time(), silence

    def fence(self) -> None:
        """Freeze this process if its supervisor, and so perhaps its lease, is gone; the supervisor thaws it.

        Each thread looks for itself before it goes on: after a thaw, none may be the first to run. One that is idle
        hears nothing, and need not.
        """
        with self._fencing:
            if self._silence is not None and boot_time() - self._heard > self._silence:
                # To this thread, which then does not get past this line; a signal to the process may take any.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
                self._heard = boot_time()

    def emit(self, event: TrainerEvent) -> None:
        """Write one line, whole. Called by the thread that serves, and by no other."""
        if isinstance(event, Measured):
            self._step = event.metrics.step
        line = event.model_dump_json().encode() + b"\n"
        self.fence()
        self._pipe.write(line)
        self._pipe.flush()
        self._emitted_at = time.monotonic()

    def tick(self, job: str) -> None:
        """Called whenever the job has got somewhere, be it a row, so that long work is not taken for none."""
        if time.monotonic() - self._emitted_at >= WORKING_EVERY:
            self.emit(Working(job=job))

    def serve(self, command: Work) -> None:
        """Answer one command; no exception of a job ends the session."""
        self._step = None
        self.listen(command.task.silence_seconds)
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
                hint = "lower trainer.max_length or lora.r, or take quantization nf4"
                # One that was trained did fit: what is short of memory then is the machine.
                told, again = f"the trainer ran out of memory: {error}", isinstance(command, Verify)
                self._fail(command, "out_of_memory", told, hint=hint, retryable=again)
            elif is_disk_full(error):
                hint = "free space on the worker's disk; the job goes on from its last checkpoint"
                self._fail(command, "disk_full", f"the worker's disk is full: {error}", hint=hint, retryable=True)
            else:
                self._fail(command, "internal_error", f"{type(error).__name__}: {error}", retryable=True)
        finally:
            self._stopping.discard(command.job)
            self.listen(None)

    def _prepare(self, command: Prepare) -> None:
        self.emit(PhaseEntered(job=command.job, phase=Phase.TOKENIZING))
        # Imported here: transformers takes seconds, and the pipe should answer at once.
        from worker.trainer.planning.prepare import prepare  # noqa: PLC0415 (import cost)

        plan = prepare(command.task, tick=lambda: self.tick(command.job))
        self.emit(Prepared(job=command.job, plan=plan))

    def _preview(self, command: Preview) -> None:
        # Imported here: transformers takes seconds, and the pipe should answer at once.
        from worker.trainer.planning.preview import preview  # noqa: PLC0415 (import cost)

        self.emit(Previewed(job=command.job, preview=preview(command, tick=lambda: self.tick(command.job))))

    def _train(self, command: Train) -> None:
        # Imported here: peft and bitsandbytes take seconds more, which `prepare` does not need.
        from worker.trainer.training.loop import train  # noqa: PLC0415 (import cost)

        labels = command.recipe.labels
        key = (command.task.base_dir, command.recipe.quantization, tuple(labels) if labels else None)
        if self._resident is not None and self._resident[0] != key:
            self._resident = None  # two may not fit; and what this run takes is measured from here on
            self._give_back()
        train(
            command,
            lambda: self._base(*key),
            emit=self.emit,
            stopping=lambda: self._is_stopping(command.job),
            tick=lambda: self.tick(command.job),
        )
        self._give_back()

    def _verify(self, command: Verify) -> None:
        from worker.trainer.artifact.verify import verify  # noqa: PLC0415 (import cost)

        stopping, tick = partial(self._is_stopping, command.job), partial(self.tick, command.job)
        self.emit(verify(command, stopping=stopping, tick=tick))
        self._give_back()

    def _export(self, command: MakeExport) -> None:
        from worker.trainer.exports.make import export  # noqa: PLC0415 (import cost)

        stopping, tick = partial(self._is_stopping, command.job), partial(self.tick, command.job)
        self.emit(export(command, stopping=stopping, tick=tick))

    def _give_back(self) -> None:
        """What is held for nothing: this process may wait for its next work while others need the memory."""
        from worker.trainer.system import free_memory  # noqa: PLC0415 (import cost)

        free_memory.free()

    def _is_stopping(self, job: str) -> bool:
        """Asked before every micro-batch, and so the place to look at the lease as well, and to be heard."""
        self.fence()
        self.tick(job)
        return job in self._stopping

    def _base(self, base_dir: str, quantization: Quantization, labels: tuple[str, ...] | None) -> Base:
        """The resident one, loaded if there is none."""
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
