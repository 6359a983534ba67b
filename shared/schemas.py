"""The wire contract: what the official `openai` client sends and reads, and what we add in the same style.

Owns: one pydantic class per concept, used by the API, stored as JSON on the job, and handed to the trainer. Field names
and types follow `openai.types.fine_tuning` and `openai.types.file_object` (openai 3.52); what we add are extra fields.
Must not know about HTTP, tables or torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _storable(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds a NUL or half of a surrogate pair; only whole Unicode characters are allowed")
    return text


Auto = Literal["auto"]
Text = Annotated[str, AfterValidator(_storable)]  # what Postgres can hold
Metadata = dict[
    Annotated[Text, StringConstraints(max_length=64)],
    Annotated[Text, StringConstraints(max_length=512)],
]


class State(StrEnum):
    """A job's state, in the words of the OpenAI API (`paused` too, though its client has no enum for it)."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class Desired(StrEnum):
    """What the user wants of a job. The supervisor reads it with each heartbeat; no sweeper writes it."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class Phase(StrEnum):
    """The finer truth inside a state."""

    TOKENIZING = "tokenizing"
    STAGING = "staging"
    LOADING = "loading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    VERIFYING = "verifying"
    PUBLISHING = "publishing"


class Wire(BaseModel):
    """Base of what we send."""

    model_config = ConfigDict(protected_namespaces=())


class Request(Wire):
    """Base of what we accept: an unknown key is an error that names it and what is allowed."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        names = set(cls.model_fields) | {field.alias for field in cls.model_fields.values()}
        unknown = sorted(set(data) - names) if isinstance(data, dict) else []
        if unknown:
            allowed = ", ".join(sorted(cls.model_fields))
            context = {"key": str(unknown[0]).encode("utf-8", "backslashreplace").decode(), "allowed": allowed}
            raise PydanticCustomError("unknown_parameter", "unknown key '{key}'; allowed: {allowed}", context)
        return data


# ---------------------------------------------------------------- requests


class Hyperparameters(Request):
    """OpenAI's three knobs. `batch_size` is examples per optimizer step, whatever the packing."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = "auto"


class DpoHyperparameters(Hyperparameters):
    """`beta` holds the tuned model to the base: the higher, the closer (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: Auto | Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] = "auto"


class Supervised(Request):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Request):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


MethodName = Literal["supervised", "dpo"]


class Method(Request):
    """How to train, its settings under the type's own name. Any other type is refused by name."""

    type: MethodName = "supervised"
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @model_validator(mode="after")
    def _no_settings_of_another_type(self) -> Self:
        foreign = self.dpo if self.type == "supervised" else self.supervised
        if foreign is not None:
            raise ValueError(
                f"holds the settings of another type; with type {self.type!r} only method.{self.type} is allowed"
            )
        return self

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Those of its type."""
        if self.type == "dpo":
            return (self.dpo or Dpo()).hyperparameters
        return (self.supervised or Supervised()).hyperparameters

    @classmethod
    def of(cls, type_: MethodName, **hyperparameters: Any) -> Self:
        """A method with all its settings spelled out."""
        return cls.model_validate({"type": type_, type_: {"hyperparameters": hyperparameters}})


class Lora(Request):
    """Adapter shape (Hu et al. 2021, arXiv:2106.09685). "auto" is resolved per dataset and shown on the job."""

    r: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    alpha: Auto | Annotated[float, Field(gt=0, le=1024)] = "auto"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1, max_length=64)] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


class Quantization(StrEnum):
    """How the frozen base is held: NF4 with double quantization (QLoRA, arXiv:2305.14314), LLM.int8(), or bf16."""

    NF4 = "nf4"
    INT8 = "int8"
    NONE = "none"


class TrainerParams(Request):
    """Settings of the loop that OpenAI does not have. Steps are optimizer steps."""

    max_length: Auto | Annotated[int, Field(ge=8, le=131072)] = "auto"
    packing: bool = True
    micro_batch: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    max_steps: Annotated[int, Field(ge=1)] | None = None
    eval_every: Annotated[int, Field(ge=1)] | None = None
    save_every: Annotated[int, Field(ge=1)] | None = None
    early_stopping: Annotated[int, Field(ge=1, description="evaluations without improvement")] | None = None


class JobCreate(Request):
    """POST /fine_tuning/jobs. The old top-level `hyperparameters` and `method.supervised.hyperparameters` are twins."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    method: Annotated[Method, BeforeValidator(lambda method: {} if method is None else method)] = Method()
    hyperparameters: Hyperparameters | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    suffix: Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] | None = None
    metadata: Metadata | None = None
    integrations: list[Any] | None = None
    lora: Lora = Lora()
    quantization: Quantization = Quantization.NF4
    trainer: TrainerParams = TrainerParams()
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    dry_run: bool = False

    @field_validator("metadata")
    @classmethod
    def _sixteen_pairs(cls, value: Metadata | None) -> Metadata | None:
        if value is not None and len(value) > 16:
            raise ValueError(f"metadata has {len(value)} pairs; at most 16 are allowed")
        return value

    @field_validator("integrations")
    @classmethod
    def _no_integrations(cls, value: list[Any] | None) -> None:
        if value:
            raise ValueError("integrations are not available on this server; leave the field out")

    @model_validator(mode="after")
    def _one_place_for_hyperparameters(self) -> Self:
        told = self.method.hyperparameters
        if self.hyperparameters is not None and self.method.type not in self.method.model_fields_set:
            told = self.hyperparameters
        self.method = Method.of(self.method.type, **told.model_dump(exclude_unset=True))
        self.hyperparameters = self.method.hyperparameters
        return self


# ---------------------------------------------------------------- what training resolves and reports


class Recipe(Wire):
    """Every number that training uses, resolved before the job is queued and shown on it. `beta` is DPO's."""

    method: MethodName
    beta: float | None
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float
    schedule: Literal["cosine", "linear"]
    warmup_steps: int
    total_steps: int
    weight_decay: float
    max_grad_norm: float
    r: int
    alpha: float
    dropout: float
    target_modules: Literal["all-linear"] | list[str]
    use_rslora: bool
    use_dora: bool
    quantization: Quantization
    max_length: int
    packing: bool
    micro_batch: int
    save_every: int
    eval_every: int | None
    early_stopping: int | None
    seed: int


class Plan(Wire):
    """What a `prepare` worker found in the dataset, and the recipe that follows from it. Counts are exact."""

    rows: int
    heldout_rows: int
    tokens: int
    trained_tokens: int
    longest_row: int
    truncated_rows: int
    dropped_rows: int
    warnings: list[str]
    recipe: Recipe


class Score(Wire):
    """Mean over the trained tokens of the held-out rows; loss in nats.

    Of DPO the loss is the mean over pairs, which is log 2 where nothing was learned; accuracy and tokens are those of
    the chosen answers. `reward_accuracy` is the share of pairs whose chosen answer gained on the rejected one, ties
    halved, and `reward_margin` by how much, times beta, in nats.
    """

    loss: float
    token_accuracy: float
    tokens: int
    reward_accuracy: float | None = None
    reward_margin: float | None = None


class Report(Wire):
    """Base against tuned, on the same rows, with the same weights and precision.

    `heldout_lines` are the 1-based lines that were carved out of the training file, 200 at most; with a validation
    file, or where none was carved, there are none to name.
    """

    base: Score
    tuned: Score
    heldout_source: Literal["validation_file", "training_file_carved", "training_file"]
    heldout_lines: list[int]
    quantization: Quantization
    compute_dtype: Literal["bfloat16", "float32"]
    steps: int
    trained_tokens: int
    trainable_parameters: int
    total_parameters: int
    train_seconds: float
    peak_memory_bytes: int


class Servable(Wire):
    """Whether vLLM takes the adapter, by the limits in its source; the least that `--max-lora-rank` must say."""

    servable: bool
    max_lora_rank: int | None
    reasons: list[str]


class Proof(Wire):
    """What a clean process saw of the published files, on the report's held-out rows.

    `base` and `tuned` were measured anew; a loss may be off the report's by `tolerance` nats. `max_logit_difference` is
    the largest that the adapter makes on a row.
    """

    base: Score
    tuned: Score
    base_deviation: float
    tuned_deviation: float
    tolerance: float
    max_logit_difference: float
    tensors: int
    tokenizer_sha256: str
    vllm: Servable


class Metrics(Wire):
    """One optimizer step, or an evaluation at that step. Losses in nats per trained token, of DPO per pair."""

    step: int
    total_steps: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    train_reward_accuracy: float | None = None
    train_reward_margin: float | None = None
    valid_reward_accuracy: float | None = None
    valid_reward_margin: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    trained_tokens: int | None = None
    tokens_per_second: float | None = None


# ---------------------------------------------------------------- responses


class RowProblem(Wire):
    """A row that cannot be trained on: where, what is wrong, and what would be right."""

    line: int
    field: str
    message: str
    hint: str


class FileReport(Wire):
    """What parsing every row of a dataset found. `problems` holds the first ones; `bad_rows` counts all."""

    rows: int
    bad_rows: int
    format: str | None
    problems: list[RowProblem]


class File(Wire):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None = None
    expires_at: int | None = None
    sha256: str
    report: FileReport | None = None


class JobError(Wire):
    """Why a job failed. `code`, `message`, `param` are OpenAI's; the rest is ours."""

    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    step: int | None = None
    last_log_lines: list[str] = []


class Progress(Wire):
    step: int
    total_steps: int
    percent: float
    tokens_per_second: float | None
    eta_seconds: int | None


class Artifact(Wire):
    """One file in the bucket; `url` is presigned and short-lived."""

    path: str
    bytes: int
    sha256: str
    url: str


class AdapterOut(Wire):
    """`signed_by` is the public key (Ed25519, base64) that the manifest's signature is by, if it has one."""

    uri: str
    bytes: int
    files: list[Artifact]
    proof: Proof | None = None
    signed_by: str | None = None


class Job(Wire):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: Hyperparameters
    method: Method
    model: str
    organization_id: str
    result_files: list[str]
    status: State
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    seed: int
    suffix: str | None
    estimated_finish: int | None
    integrations: list[Any]
    metadata: Metadata | None
    phase: Phase | None
    reason: str | None
    queue_position: int | None
    attempt: int
    priority: int
    lora: Lora
    quantization: Quantization
    trainer: TrainerParams
    dry_run: bool
    plan: Plan | None
    progress: Progress | None
    report: Report | None
    adapter: AdapterOut | None


class Event(Wire):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class Checkpoint(Wire):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: Metrics
    step_number: int


class Model(Wire):
    """A base model of the catalog, or a tenant's fine-tuned one (`base` and `job` set)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    public_id: str | None = None
    revision: str | None = None
    license: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    base: str | None = None
    job: str | None = None
    files: list[Artifact] | None = None


class Deleted(Wire):
    id: str
    object: str
    deleted: Literal[True] = True


Item = TypeVar("Item", bound=Wire)


class Page(Wire, Generic[Item]):
    """A keyset page. `has_more` is honest: one row more than asked for was looked for."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None
