"""Request objects of the API, and the enums that all parts of the system share.

Owns: one pydantic class per concept, used by the API, stored as JSON on the job, and sent to the trainer. Field names
and types follow `openai.types.fine_tuning` (openai 3.52); our own fields are in the same style. Results of training are
in `shared/schemas/results.py`, responses of the API in `shared/schemas/responses.py`.
Must not depend on HTTP, tables or torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _storable(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("contains a NUL or an unpaired surrogate; allowed: Unicode text without NUL")
    return text


Auto = Literal["auto"]
Text = Annotated[str, AfterValidator(_storable)]  # text that Postgres can store
TrackerName = Annotated[Text, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
Metadata = dict[
    Annotated[Text, StringConstraints(max_length=64)],
    Annotated[Text, StringConstraints(max_length=512)],
]


class State(StrEnum):
    """State of a job, named as in the OpenAI API. Its official client has no enum value for `paused`."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class Desired(StrEnum):
    """The state that the user has asked for. The worker reads it with each heartbeat; the sweeper never writes it."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class Phase(StrEnum):
    """What a worker is currently doing with a job, within its state."""

    TOKENIZING = "tokenizing"
    STAGING = "staging"
    LOADING = "loading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    VERIFYING = "verifying"
    EXPORTING = "exporting"
    PUBLISHING = "publishing"


class Wire(BaseModel):
    """Base class of every object that is sent or stored."""

    model_config = ConfigDict(protected_namespaces=())


class Request(Wire):
    """Base class of every object that is accepted. An unknown key is an error that lists the allowed keys."""

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
    """OpenAI's three hyperparameters. `batch_size` is the number of examples per optimizer step, packed or not.

    "auto" is resolved per dataset and shown in the job's plan.
    """

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = "auto"


class DpoHyperparameters(Hyperparameters):
    """Hyperparameters of DPO. A higher `beta` keeps the tuned model closer to the reference; "auto" is 0.1.

    Direct preference optimization: Rafailov et al. 2023, arXiv:2305.18290.
    """

    beta: Auto | Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] = "auto"


class Supervised(Request):
    """Settings of method `supervised`."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Request):
    """Settings of method `dpo`."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Classification(Request):
    """Settings of method `classification`."""

    hyperparameters: Hyperparameters = Hyperparameters()


MethodName = Literal["supervised", "dpo", "classification"]


class Method(Request):
    """The training method. Its settings go under the key that equals `type`; settings of another type are an error."""

    type: MethodName = "supervised"
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    classification: Classification | None = None

    @model_validator(mode="after")
    def _no_settings_of_another_type(self) -> Self:
        settings = {"supervised": self.supervised, "dpo": self.dpo, "classification": self.classification}
        if any(found is not None for type_, found in settings.items() if type_ != self.type):
            raise ValueError(
                f"contains settings of another type; with type {self.type!r} only method.{self.type} is allowed"
            )
        return self

    @property
    def settings(self) -> Supervised | Dpo | Classification | None:
        """The settings of this type, or None if the request has none."""
        match self.type:
            case "supervised":
                return self.supervised
            case "dpo":
                return self.dpo
            case "classification":
                return self.classification

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The hyperparameters of this type; the defaults if the request has none."""
        if self.settings is None:
            return DpoHyperparameters() if self.type == "dpo" else Hyperparameters()
        return self.settings.hyperparameters

    @classmethod
    def of(cls, type_: MethodName, **hyperparameters: Any) -> Self:
        """Create a method of this type with these hyperparameters."""
        return cls.model_validate({"type": type_, type_: {"hyperparameters": hyperparameters}})


class Lora(Request):
    """Settings of the LoRA adapter (Hu et al. 2021, arXiv:2106.09685). The job shows what "auto" is resolved to.

    `loraplus_lr_ratio` is the learning rate of the B matrices divided by that of the A matrices (LoRA+, Hayou et al.
    2024, arXiv:2402.12354); null means the same rate for both.
    """

    r: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    alpha: Auto | Annotated[float, Field(gt=0, le=1024)] = "auto"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1, max_length=64)] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1024)] | None = None


class Quantization(StrEnum):
    """Quantization of the frozen base model during training.

    `nf4` is 4-bit NormalFloat with double quantization (QLoRA, arXiv:2305.14314), `int8` is LLM.int8()
    (arXiv:2208.07339), `none` is bf16.
    """

    NF4 = "nf4"
    INT8 = "int8"
    NONE = "none"


class ExportName(StrEnum):
    """An additional format in which an adapter is published. Exports are made in this order.

    `merged` adds the adapter to the base model's original weights, `merged_dequantized` to the dequantized weights that
    it was trained on; both are folders of safetensors. `gguf_adapter` is the adapter alone, `gguf_merged` the model of
    `merged`, as GGUF files for llama.cpp.
    """

    MERGED = "merged"
    MERGED_DEQUANTIZED = "merged_dequantized"
    GGUF_ADAPTER = "gguf_adapter"
    GGUF_MERGED = "gguf_merged"


def _each_once(names: list[ExportName]) -> list[ExportName]:
    if repeated := sorted({name.value for name in names if names.count(name) > 1}):
        raise ValueError(f"names {', '.join(repeated)} more than once; list each export once")
    return names


class TrainerParams(Request):
    """Training settings beyond OpenAI's. Steps are optimizer steps, lengths are tokens.

    Longer rows are cut at `max_length`. `packing` puts several short rows into one sequence. `micro_batch` is the
    number of rows per forward pass; with packing it stands for tokens (`micro_batch` times the longest row, or times
    128 if that is more). `gradient_checkpointing` recomputes activations to save memory. Neither of the two changes the
    result. `full_finetuning` trains all weights of a small base model instead of an adapter.
    """

    max_length: Auto | Annotated[int, Field(ge=8, le=131072)] = "auto"
    packing: bool = True
    micro_batch: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    gradient_checkpointing: Auto | bool = "auto"
    max_steps: Annotated[int, Field(ge=1)] | None = None
    eval_every: Annotated[int, Field(ge=1)] | None = None
    save_every: Annotated[int, Field(ge=1)] | None = None
    early_stopping: Annotated[int, Field(ge=1, description="stop after N evaluations without improvement")] | None = (
        None
    )
    skip_bad_rows: Annotated[int, Field(ge=0, description="leave out up to N bad rows per file")] = 0
    full_finetuning: bool = False
    exports: Annotated[list[ExportName], AfterValidator(_each_once)] = []


class Wandb(Request):
    """A run at Weights & Biases; the fields are OpenAI's. `name` defaults to the job's id."""

    project: TrackerName
    name: Annotated[Text, StringConstraints(min_length=1, max_length=128)] | None = None
    entity: TrackerName | None = None
    tags: Annotated[list[Annotated[Text, StringConstraints(min_length=1, max_length=64)]], Field(max_length=20)] = []


class Mlflow(Request):
    """A run in an experiment of an MLflow server. `run_name` defaults to the job's id."""

    experiment: Annotated[Text, StringConstraints(min_length=1, max_length=250)]
    run_name: Annotated[Text, StringConstraints(min_length=1, max_length=250)] | None = None
    tags: Annotated[
        dict[
            Annotated[Text, StringConstraints(max_length=250, pattern=r"^[\w ./-]+$")],
            Annotated[Text, StringConstraints(max_length=500)],
        ],
        Field(max_length=20),
    ] = {}

    @field_validator("tags")
    @classmethod
    def _no_reserved_tags(cls, value: dict[str, str]) -> dict[str, str]:
        """Reject tags that we set ourselves: a resumed job finds its run by such a tag, and must not find another."""
        if reserved := sorted(key for key in value if key.startswith(("mlflow.", "milliner."))):
            raise ValueError(
                f"{reserved[0]!r} is reserved; allowed: keys that start with neither mlflow. nor milliner."
            )
        return value


TrackerKind = Literal["wandb", "mlflow"]


class Integration(Request):
    """An experiment tracker that the job's metrics are sent to. Its settings go under the key that equals `type`.

    The operator of the server configures the tracker's address and key. In a response, the key of the other type is
    absent, as in OpenAI's API.
    """

    type: TrackerKind
    wandb: Annotated[Wandb | None, Field(exclude_if=lambda value: value is None)] = None
    mlflow: Annotated[Mlflow | None, Field(exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _settings_of_its_type(self) -> Self:
        present = {name for name in get_args(TrackerKind) if getattr(self, name) is not None}
        if present != {self.type}:
            found = ", ".join(sorted(present)) or "none"
            raise ValueError(
                f"type {self.type!r} needs its settings under {self.type!r} and under no other type; found: {found}"
            )
        return self


class JobCreate(Request):
    """Request body of `POST /fine_tuning/jobs`.

    `hyperparameters` is the deprecated place for `method.<type>.hyperparameters`; the latter takes precedence.
    `from_checkpoint` names the adapter or checkpoint that training starts from. `model` may name it instead; the base
    model is then the one of that adapter. A job with `dry_run` validates the files and makes a plan, but does not
    train.
    """

    model: Text
    training_file: Text
    validation_file: Text | None = None
    method: Annotated[Method, BeforeValidator(lambda method: {} if method is None else method)] = Method()
    hyperparameters: Hyperparameters | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    suffix: Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] | None = None
    metadata: Metadata | None = None
    integrations: list[Integration] | None = None
    trainer: TrainerParams = TrainerParams()  # before `lora` and `quantization`, whose validators read it
    lora: Lora = Lora()
    quantization: Quantization = Quantization.NF4
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    from_checkpoint: Text | None = None
    dry_run: bool = False

    @field_validator("metadata")
    @classmethod
    def _at_most_16_pairs(cls, value: Metadata | None) -> Metadata | None:
        if value is not None and len(value) > 16:
            raise ValueError(f"metadata has {len(value)} pairs; at most 16 are allowed")
        return value

    @field_validator("integrations")
    @classmethod
    def _one_of_each_type(cls, value: list[Integration] | None) -> list[Integration] | None:
        types = [integration.type for integration in value or ()]
        if len(set(types)) < len(types):
            raise ValueError(f"lists {', '.join(types)}; a job has one run per tracker: list each type once")
        return value

    @field_validator("trainer")
    @classmethod
    def _no_full_finetuning_with_classification(cls, value: TrainerParams, info: ValidationInfo) -> TrainerParams:
        method = info.data.get("method")
        if value.full_finetuning and isinstance(method, Method) and method.type == "classification":
            raise ValueError(
                "full_finetuning is not supported with method classification; it is allowed with the methods "
                "supervised and dpo"
            )
        return value

    @field_validator("lora")
    @classmethod
    def _no_lora_with_full_finetuning(cls, value: Lora, info: ValidationInfo) -> Lora:
        if _is_full(info) and value != Lora():
            raise ValueError(
                "is not allowed with trainer.full_finetuning, which trains all weights and has no adapter; remove one "
                "of the two"
            )
        return value

    @field_validator("quantization")
    @classmethod
    def _no_quantization_with_full_finetuning(cls, value: Quantization, info: ValidationInfo) -> Quantization:
        if _is_full(info) and value is not Quantization.NONE:
            raise ValueError('trainer.full_finetuning needs unquantized weights; allowed: "none", or leave it out')
        return value

    @model_validator(mode="after")
    def _default_quantization_of_full_finetuning(self) -> Self:
        if self.trainer.full_finetuning:
            self.quantization = Quantization.NONE  # the request had "none" or nothing
        return self

    @model_validator(mode="after")
    def _merge_hyperparameters(self) -> Self:
        hyperparameters = self.method.hyperparameters
        settings = self.method.settings
        if self.hyperparameters is not None and not (settings and "hyperparameters" in settings.model_fields_set):
            hyperparameters = self.hyperparameters
        self.method = Method.of(self.method.type, **hyperparameters.model_dump(exclude_unset=True))
        self.hyperparameters = self.method.hyperparameters
        return self


def _is_full(info: ValidationInfo) -> bool:
    """Whether the job under validation trains all weights. `info.data` holds only the fields that are valid so far."""
    trainer = info.data.get("trainer")
    return isinstance(trainer, TrainerParams) and trainer.full_finetuning
