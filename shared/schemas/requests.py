"""The wire contract: the words that all speak, and what the official `openai` client sends.

Owns: one pydantic class per concept, used by the API, stored as JSON on the job, and handed to the trainer. Field names
and types follow `openai.types.fine_tuning` (openai 3.52); what we add are extra fields in the same style. What training
answers is in `shared/schemas/results.py`, what the API answers in `shared/schemas/responses.py`.
Must not know about HTTP, tables or torch.
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
        raise ValueError("holds a NUL or half of a surrogate pair; only whole Unicode characters are allowed")
    return text


Auto = Literal["auto"]
Text = Annotated[str, AfterValidator(_storable)]  # what Postgres can hold
TrackerName = Annotated[Text, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
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
    EXPORTING = "exporting"
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


class Classification(Request):
    hyperparameters: Hyperparameters = Hyperparameters()


MethodName = Literal["supervised", "dpo", "classification"]


class Method(Request):
    """How to train, its settings under the type's own name. Any other type is refused by name."""

    type: MethodName = "supervised"
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    classification: Classification | None = None

    @model_validator(mode="after")
    def _no_settings_of_another_type(self) -> Self:
        settings = {"supervised": self.supervised, "dpo": self.dpo, "classification": self.classification}
        if any(found is not None for type_, found in settings.items() if type_ != self.type):
            raise ValueError(
                f"holds the settings of another type; with type {self.type!r} only method.{self.type} is allowed"
            )
        return self

    @property
    def settings(self) -> Supervised | Dpo | Classification | None:
        """Those of its type, if any were given."""
        match self.type:
            case "supervised":
                return self.supervised
            case "dpo":
                return self.dpo
            case "classification":
                return self.classification

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Those of its type."""
        if self.settings is None:
            return DpoHyperparameters() if self.type == "dpo" else Hyperparameters()
        return self.settings.hyperparameters

    @classmethod
    def of(cls, type_: MethodName, **hyperparameters: Any) -> Self:
        """A method with all its settings spelled out."""
        return cls.model_validate({"type": type_, type_: {"hyperparameters": hyperparameters}})


class Lora(Request):
    """Adapter shape (Hu et al. 2021, arXiv:2106.09685). "auto" is resolved per dataset and shown on the job.

    `loraplus_lr_ratio` is how many times the rate B learns at (LoRA+, Hayou et al. 2024, arXiv:2402.12354).
    """

    r: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    alpha: Auto | Annotated[float, Field(gt=0, le=1024)] = "auto"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1, max_length=64)] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1024)] | None = None


class Quantization(StrEnum):
    """How the frozen base is held: NF4 with double quantization (QLoRA, arXiv:2305.14314), LLM.int8(), or bf16."""

    NF4 = "nf4"
    INT8 = "int8"
    NONE = "none"


class ExportName(StrEnum):
    """A form that an adapter is published in beside its own, in this order.

    `merged` lays it on the base's original weights, `merged_dequantized` on those that it was trained against, both as
    a folder of safetensors. The GGUF files are llama.cpp's: the adapter alone, and what `merged` holds.
    """

    MERGED = "merged"
    MERGED_DEQUANTIZED = "merged_dequantized"
    GGUF_ADAPTER = "gguf_adapter"
    GGUF_MERGED = "gguf_merged"


def _each_once(names: list[ExportName]) -> list[ExportName]:
    if repeated := sorted({name.value for name in names if names.count(name) > 1}):
        raise ValueError(f"names {', '.join(repeated)} more than once; each export is made once")
    return names


class TrainerParams(Request):
    """Settings of the loop that OpenAI does not have. Steps are optimizer steps.

    `full_finetuning` trains all weights of a small base instead of an adapter on it.
    """

    max_length: Auto | Annotated[int, Field(ge=8, le=131072)] = "auto"
    packing: bool = True
    micro_batch: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    gradient_checkpointing: Auto | bool = "auto"
    max_steps: Annotated[int, Field(ge=1)] | None = None
    eval_every: Annotated[int, Field(ge=1)] | None = None
    save_every: Annotated[int, Field(ge=1)] | None = None
    early_stopping: Annotated[int, Field(ge=1, description="evaluations without improvement")] | None = None
    skip_bad_rows: Annotated[int, Field(ge=0, description="rows of a file that may be bad and are left out")] = 0
    full_finetuning: bool = False
    exports: Annotated[list[ExportName], AfterValidator(_each_once)] = []


class Wandb(Request):
    """A run at Weights & Biases, as OpenAI has it. Without a `name` it bears the job's id."""

    project: TrackerName
    name: Annotated[Text, StringConstraints(min_length=1, max_length=128)] | None = None
    entity: TrackerName | None = None
    tags: Annotated[list[Annotated[Text, StringConstraints(min_length=1, max_length=64)]], Field(max_length=20)] = []


class Mlflow(Request):
    """A run in an experiment of an MLflow server. Without a `run_name` it bears the job's id."""

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
    def _none_of_ours(cls, value: dict[str, str]) -> dict[str, str]:
        """A job finds its run again by such a tag, and must not find another's."""
        if reserved := sorted(key for key in value if key.startswith(("mlflow.", "milliner."))):
            raise ValueError(
                f"{reserved[0]!r} is reserved; allowed: keys that begin with neither mlflow. nor milliner."
            )
        return value


TrackerKind = Literal["wandb", "mlflow"]


class Integration(Request):
    """A tracker that is told of a job, its settings under the type's own name. Where it lives, the server alone says.

    The key of another type is left out on the wire: OpenAI's has none.
    """

    type: TrackerKind
    wandb: Annotated[Wandb | None, Field(exclude_if=lambda value: value is None)] = None
    mlflow: Annotated[Mlflow | None, Field(exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _settings_of_its_type(self) -> Self:
        told = {name for name in get_args(TrackerKind) if getattr(self, name) is not None}
        if told != {self.type}:
            found = ", ".join(sorted(told)) or "none"
            raise ValueError(
                f"of type {self.type!r} needs its settings under {self.type!r} and no other; found: {found}"
            )
        return self


class JobCreate(Request):
    """POST /fine_tuning/jobs. The old top-level `hyperparameters` and `method.supervised.hyperparameters` are twins.

    `from_checkpoint` is what the adapter starts as; `model` may name it too, and the base is then its base.
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
    trainer: TrainerParams = TrainerParams()  # before the two that are checked against it
    lora: Lora = Lora()
    quantization: Quantization = Quantization.NF4
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    from_checkpoint: Text | None = None
    dry_run: bool = False

    @field_validator("metadata")
    @classmethod
    def _sixteen_pairs(cls, value: Metadata | None) -> Metadata | None:
        if value is not None and len(value) > 16:
            raise ValueError(f"metadata has {len(value)} pairs; at most 16 are allowed")
        return value

    @field_validator("integrations")
    @classmethod
    def _one_of_each_type(cls, value: list[Integration] | None) -> list[Integration] | None:
        types = [integration.type for integration in value or ()]
        if len(set(types)) < len(types):
            raise ValueError(f"names {', '.join(types)}; a job has one run at each tracker: each type once")
        return value

    @field_validator("trainer")
    @classmethod
    def _a_classifier_has_an_adapter(cls, value: TrainerParams, info: ValidationInfo) -> TrainerParams:
        method = info.data.get("method")
        if value.full_finetuning and isinstance(method, Method) and method.type == "classification":
            raise ValueError("full_finetuning is of text: allowed with the methods supervised and dpo; leave it out")
        return value

    @field_validator("lora")
    @classmethod
    def _no_adapter_on_what_is_trained_whole(cls, value: Lora, info: ValidationInfo) -> Lora:
        if _is_full(info) and value != Lora():
            raise ValueError("trainer.full_finetuning trains all weights and has no adapter; leave one of the two out")
        return value

    @field_validator("quantization")
    @classmethod
    def _nothing_quantized_is_trained(cls, value: Quantization, info: ValidationInfo) -> Quantization:
        if _is_full(info) and value is not Quantization.NONE:
            raise ValueError('trainer.full_finetuning trains no quantized weights; allowed: "none", or leave it out')
        return value

    @model_validator(mode="after")
    def _full_finetuning_is_not_quantized(self) -> Self:
        if self.trainer.full_finetuning:
            self.quantization = Quantization.NONE  # said, or left out
        return self

    @model_validator(mode="after")
    def _one_place_for_hyperparameters(self) -> Self:
        told = self.method.hyperparameters
        settings = self.method.settings
        if self.hyperparameters is not None and not (settings and "hyperparameters" in settings.model_fields_set):
            told = self.hyperparameters
        self.method = Method.of(self.method.type, **told.model_dump(exclude_unset=True))
        self.hyperparameters = self.method.hyperparameters
        return self


def _is_full(info: ValidationInfo) -> bool:
    """Does a job that is being read train all weights? Only what is right so far is in `info.data`."""
    trainer = info.data.get("trainer")
    return isinstance(trainer, TrainerParams) and trainer.full_finetuning
