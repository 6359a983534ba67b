"""The pipe between the supervisor and the trainer child: JSON lines, each bearing a job id.

Commands go down the child's stdin, events come up its stdout. Files change hands as paths inside the attempt's work
directory, which both ends can read. The child gets nothing else: no database, no broker, no S3, no network.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter

from shared.schemas.memory import KnownDevice
from shared.schemas.preview import PreviewOut
from shared.schemas.requests import ExportName, Lora, Method, Phase, Quantization, TrainerParams
from shared.schemas.results import Export, Metrics, Plan, Proof, Recipe, Report


class Task(BaseModel):
    """All that the child is told about a job. Paths are absolute and local.

    `start_from` is a folder with the adapter that training begins with, and `start_name` what its owner calls it.
    `devices` are those that training workers have reported; `device_memory_bytes` what a run may take, 0 all there is.
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
    """Parse and tokenize every row; answer `prepared` or `failed`."""

    op: Literal["prepare"] = "prepare"
    job: str
    task: Task


class Preview(BaseModel):
    """Show the rows at `lines`, or the first `rows`, as tokens; answer `previewed` or `failed`."""

    op: Literal["preview"] = "preview"
    job: str
    task: Task
    rows: int
    lines: list[int] | None = None


class Train(BaseModel):
    """Train, evaluate, leave an adapter under `work_dir`; answer `done`, `stopped` or `failed`.

    `resume_from` is the folder of a checkpoint that an earlier attempt left; the run goes on bit for bit from there.
    `fallback_level` is how often the kernel killed an attempt for its memory: the micro-batch is halved as often.
    """

    op: Literal["train"] = "train"
    job: str
    task: Task
    recipe: Recipe
    work_dir: str
    resume_from: str | None = None
    fallback_level: int = 0


class Verify(BaseModel):
    """Prove the adapter that was fetched back into `adapter_dir`; answer `verified` or `failed`.

    For a process that has trained nothing. The adapter must reproduce `report`, which was made at `fallback_level`.
    """

    op: Literal["verify"] = "verify"
    job: str
    task: Task
    recipe: Recipe
    adapter_dir: str
    report: Report
    fallback_level: int = 0


class MakeExport(BaseModel):
    """Write one more form of the proven adapter in `adapter_dir`, load it again; answer `exported` or `failed`.

    For a process of its own: whatever it dies of costs this export alone. `proof` has the score to compare with.
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
    """The supervisor runs and holds the lease. A child that has not heard this for `silence_seconds` freezes itself."""

    op: Literal["alive"] = "alive"
    job: str


class Stop(BaseModel):
    """Finish the current step, leave a checkpoint, answer `stopped`."""

    op: Literal["stop"] = "stop"
    job: str


Command = Annotated[Prepare | Preview | Train | Verify | MakeExport | Stop | Alive, Field(discriminator="op")]


class PhaseEntered(BaseModel):
    event: Literal["phase"] = "phase"
    job: str
    phase: Phase


class Notice(BaseModel):
    """A line for the job's event list."""

    event: Literal["notice"] = "notice"
    job: str
    level: Literal["info", "warn", "error"]
    message: str


class Working(BaseModel):
    """Still getting somewhere: said every few seconds at most, and only when nothing else is."""

    event: Literal["working"] = "working"
    job: str


class Prepared(BaseModel):
    event: Literal["prepared"] = "prepared"
    job: str
    plan: Plan


class Previewed(BaseModel):
    event: Literal["previewed"] = "previewed"
    job: str
    preview: PreviewOut


class Measured(BaseModel):
    event: Literal["metrics"] = "metrics"
    job: str
    metrics: Metrics


class CheckpointSaved(BaseModel):
    """A complete folder lies at `path`; it is the supervisor's to upload and then delete."""

    event: Literal["checkpoint"] = "checkpoint"
    job: str
    step: int
    path: str
    metrics: Metrics


class Done(BaseModel):
    """The adapter folder at `path` is complete, `report.json` and `metrics.jsonl` included.

    `fallback_level` is how narrow the micro-batch had become when the report was made.
    """

    event: Literal["done"] = "done"
    job: str
    path: str
    report: Report
    fallback_level: int = 0


class Verified(BaseModel):
    """The adapter stands its proof. `versions` are those of the packages that it was made and read with."""

    event: Literal["verified"] = "verified"
    job: str
    proof: Proof
    versions: dict[str, str]


class Exported(BaseModel):
    """A complete folder lies at `path` and has been loaded again; it is the supervisor's to upload and then delete."""

    event: Literal["exported"] = "exported"
    job: str
    path: str
    export: Export


class Stopped(BaseModel):
    """Asked to stop and did; the last `checkpoint` event holds all that was trained, unless the disk was full."""

    event: Literal["stopped"] = "stopped"
    job: str
    step: int


class Failed(BaseModel):
    """This job cannot go on. `retryable` is false for what its user must mend (data, settings), true for the rest.

    The code `disk_full` is the machine's fault: the job goes back to the queue, and no crash is counted.
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
