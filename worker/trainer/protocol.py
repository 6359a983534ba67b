"""The pipe between the supervisor and the trainer child: JSON lines, each with a job id.

The supervisor writes commands to the child's stdin; the child writes events to its stdout. Files are passed as paths
that both processes can read. The child has no other input: no database, broker, S3 or network.

`Prepare`, `Preview`, `Train`, `Verify` and `MakeExport` are work: the child runs them one at a time, in order, and ends
each with exactly one final event, unless it dies. `Stop` and `Alive` are read at any time, also during work.

    command     final event
    Prepare     Prepared or Failed
    Preview     Previewed or Failed
    Train       Done, Stopped or Failed
    Verify      Verified or Failed
    MakeExport  Exported or Failed

`PhaseEntered`, `Notice`, `Working`, `Measured` and `CheckpointSaved` come before the final event.
Owns: the messages. Must not import torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter

from shared.schemas.memory import KnownDevice
from shared.schemas.preview import PreviewOut
from shared.schemas.requests import ExportName, Lora, Method, Phase, Quantization, TrainerParams
from shared.schemas.results import Export, Metrics, Plan, Proof, Recipe, Report


class Task(BaseModel):
    """What a job is: its base, files and settings. Paths are absolute and local.

    `base_dir` is the folder of the base model, `base_name` and `base_revision` its public id and commit,
    `base_license` and `base_parameters` its license and number of parameters, if known.
    `validation_file` is None if the job has none: some training rows are held out instead.
    `start_from` is a folder with the adapter that training starts from, `start_name` the name its owner gave it.
    `torch_threads` is the number of CPU threads; 0 leaves the choice to torch.
    `full_finetuning_bytes` is the most memory that full fine-tuning may need, at 22 bytes per parameter; `prepare`
    refuses a larger base. None means no limit.
    `devices` are the devices that training workers have reported.
    `device_memory_bytes` is the memory that a run may use; 0 means all of the device's.
    `max_row_bytes` is the longest line that a dataset may have.
    `silence_seconds` is how long the child runs without an `Alive` before it freezes itself; None means forever.
    """

    base_dir: str
    base_name: str
    base_revision: str
    base_license: str | None = None
    base_parameters: int | None = None
    training_file: str
    validation_file: str | None
    start_from: str | None = None
    start_name: str | None = None
    method: Method
    lora: Lora
    quantization: Quantization
    trainer: TrainerParams
    seed: int
    torch_threads: int = 0
    full_finetuning_bytes: int | None = None
    devices: list[KnownDevice] = []
    device_memory_bytes: int = 0
    max_row_bytes: int
    silence_seconds: float | None = None


class Prepare(BaseModel):
    """Read and tokenize every row, and work out the recipe. Ends with `Prepared` or `Failed`."""

    op: Literal["prepare"] = "prepare"
    job: str
    task: Task


class Preview(BaseModel):
    """Tokenize a few rows and show them as text with their trained spans. Ends with `Previewed` or `Failed`.

    The rows are those at `lines` (1-based), or the first `rows` if `lines` is None.
    """

    op: Literal["preview"] = "preview"
    job: str
    task: Task
    rows: int
    lines: list[int] | None = None


class Train(BaseModel):
    """Train and evaluate, and write the adapter under `work_dir`. Ends with `Done`, `Stopped` or `Failed`.

    `recipe` comes from the job's `Prepared` event.
    `resume_from` is the folder of an earlier attempt's checkpoint; the run resumes from it bit for bit.
    `fallback_level` is the level to start at, an index into `shared.estimation.fallback.fallback_levels`; 0 uses the
    most memory. The supervisor raises it by one each time the kernel kills an attempt for lack of memory.
    """

    op: Literal["train"] = "train"
    job: str
    task: Task
    recipe: Recipe
    work_dir: str
    resume_from: str | None = None
    fallback_level: int = 0


class Verify(BaseModel):
    """Check that the adapter in `adapter_dir`, downloaded after its upload, gives the scores in `report`.

    Ends with `Verified` or `Failed`. It must run in a process that has trained nothing. `fallback_level` is the level
    that `report` was made at.
    """

    op: Literal["verify"] = "verify"
    job: str
    task: Task
    recipe: Recipe
    adapter_dir: str
    report: Report
    fallback_level: int = 0


class MakeExport(BaseModel):
    """Write the verified adapter in `adapter_dir` in another form, load that again and compare the two.

    Ends with `Exported` or `Failed`. It runs in a process of its own, so that a crash costs only this export. The files
    go under `work_dir`. `proof` has the scores to compare with; `fallback_level` is the level they were measured at.
    """

    op: Literal["export"] = "export"
    job: str
    task: Task
    recipe: Recipe
    name: ExportName
    adapter_dir: str
    work_dir: str
    proof: Proof
    fallback_level: int = 0


class Alive(BaseModel):
    """The supervisor is running and holds the job's lease.

    The supervisor sends it repeatedly. A child that works on a task with `silence_seconds` and receives none for that
    long stops itself with SIGSTOP; the supervisor resumes it with SIGCONT. An idle child ignores it.
    """

    op: Literal["alive"] = "alive"
    job: str


class Stop(BaseModel):
    """Stop training `job` before its next micro-batch, save a checkpoint of the last full step, and answer `Stopped`.

    An unfinished optimizer step is discarded. The supervisor sends it for `Train` only. A `Stop` that arrives when its
    job has no command waiting or running has no effect.
    """

    op: Literal["stop"] = "stop"
    job: str


Command = Annotated[Prepare | Preview | Train | Verify | MakeExport | Stop | Alive, Field(discriminator="op")]


class PhaseEntered(BaseModel):
    """The job has entered this phase."""

    event: Literal["phase"] = "phase"
    job: str
    phase: Phase


class Notice(BaseModel):
    """A message for the job's event list."""

    event: Literal["notice"] = "notice"
    job: str
    level: Literal["info", "warn", "error"]
    message: str


class Working(BaseModel):
    """The job makes progress. Sent only after WORKING_SECONDS (`main.py`) without another event.

    Without it, the supervisor would treat long work as stuck.
    """

    event: Literal["working"] = "working"
    job: str


class Prepared(BaseModel):
    """Final event of `Prepare`: the dataset is valid; `plan` has the recipe, statistics and warnings."""

    event: Literal["prepared"] = "prepared"
    job: str
    plan: Plan


class Previewed(BaseModel):
    """Final event of `Preview`: the rows as text, with the trained spans marked."""

    event: Literal["previewed"] = "previewed"
    job: str
    preview: PreviewOut


class Measured(BaseModel):
    """Metrics of one optimizer step, or of an evaluation after that step."""

    event: Literal["metrics"] = "metrics"
    job: str
    metrics: Metrics


class CheckpointSaved(BaseModel):
    """The folder `path` is a complete checkpoint of `step`. The supervisor uploads the folder and then deletes it."""

    event: Literal["checkpoint"] = "checkpoint"
    job: str
    step: int
    path: str
    metrics: Metrics


class Done(BaseModel):
    """Final event of `Train`: the folder `path` is complete, with `report.json` and `metrics.jsonl`.

    `fallback_level` is the level that the report was made at.
    """

    event: Literal["done"] = "done"
    job: str
    path: str
    report: Report
    fallback_level: int = 0


class Verified(BaseModel):
    """Final event of `Verify`: the adapter passed. `versions` are those of the packages that made and loaded it."""

    event: Literal["verified"] = "verified"
    job: str
    proof: Proof
    versions: dict[str, str]


class Exported(BaseModel):
    """Final event of `MakeExport`: the folder `path` is complete and was loaded again.

    The supervisor uploads the folder and then deletes it.
    """

    event: Literal["exported"] = "exported"
    job: str
    path: str
    export: Export


class Stopped(BaseModel):
    """Final event of `Train` after a `Stop`: `step` is the last full step.

    Everything that was trained is in the last checkpoint, unless the disk was full.
    """

    event: Literal["stopped"] = "stopped"
    job: str
    step: int


class Failed(BaseModel):
    """Final event of any command: it cannot be completed. `code` is a stable error code.

    `retryable` is false for what the user must fix (data, settings), true for everything else. `param` is the request
    field at fault, `step` the last optimizer step that was measured. The code `disk_full` means this machine's disk:
    the job returns to the queue, and no crash is counted.
    """

    event: Literal["failed"] = "failed"
    job: str
    code: str
    message: str
    hint: str | None = None
    param: str | None = None
    step: int | None = None
    retryable: bool


TrainerEvent = Annotated[
    PhaseEntered
    | Notice
    | Working
    | Prepared
    | Previewed
    | Measured
    | CheckpointSaved
    | Done
    | Verified
    | Exported
    | Stopped
    | Failed,
    Field(discriminator="event"),
]

COMMAND: TypeAdapter[Command] = TypeAdapter(Command)
EVENT: TypeAdapter[TrainerEvent] = TypeAdapter(TrainerEvent)
