"""Results of training: recipe, plan, report, proof, exports, metrics, errors.

Owns: their schemas, as sent over HTTP, sent by the trainer to the worker, and stored as JSON on a job.
Must not depend on HTTP, tables or torch.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

from pydantic import Field, computed_field

from shared.schemas.memory import MeasuredFit, PlannedFit
from shared.schemas.requests import ExportName, MethodName, Quantization, Text, Wire


class Recipe(Wire):
    """Every number that training uses. It is resolved before the job is queued, and shown on the job.

    `beta` is set for DPO only, `labels` for classification only; the model's output index is a position in `labels`.
    With `full_finetuning`, all weights are trained: `r` and `alpha` are 0, and the other LoRA settings are not used.
    `gradient_checkpointing` is null if no device was known; it is then on for a GPU and off for a CPU. `total_steps`,
    `warmup_steps`, `save_every` and `eval_every` are optimizer steps, `max_length` is in tokens.
    """

    method: MethodName = "supervised"
    full_finetuning: bool = False
    beta: float | None = None
    labels: list[str] | None = None
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
    loraplus_lr_ratio: float | None = None
    quantization: Quantization
    max_length: int
    packing: bool
    micro_batch: int
    gradient_checkpointing: bool | None = None
    save_every: int
    eval_every: int | None
    early_stopping: int | None
    seed: int


class RowProblem(Wire):
    """A row that cannot be trained on: 1-based line, JSON path of the field, what was found, and what is allowed."""

    line: int
    field: str
    message: str
    hint: str


class FileReport(Wire):
    """Result of parsing every row of a dataset. `rows` counts the valid rows.

    `bad_rows` counts all invalid rows; `problems` lists the first ones.
    """

    rows: int
    bad_rows: int
    format: str | None
    problems: list[RowProblem]


class LengthBucket(Wire):
    """Number of rows with at most `upto` tokens (a power of two) and more than half of that."""

    upto: int
    rows: int


class Repeat(Wire):
    """The row at `line` has the same tokens and the same trained tokens or label as the row at line `of`."""

    line: int
    of: int


class LabelCount(Wire):
    """Number of rows with this label."""

    label: str
    rows: int


class DataReport(FileReport):
    """Statistics of the training file after tokenization.

    `rows` counts the valid rows, including held-out ones; `bad_rows` were left out because of `trainer.skip_bad_rows`.
    Tokens and lengths are of whole rows, before they are cut at the maximum length. `truncated_rows` are longer than
    that; `dropped_rows` have no trained token left after the cut. `duplicate_rows` repeat an earlier row;
    `heldout_overlap_rows` are held-out rows that are also in the training rows. `duplicates` and `heldout_overlap` list
    the first of these. `stop_rows` end, after the cut, in a trained stop token; `stop_token` is the most frequent one.
    `double_bos_rows` begin with two beginning-of-sequence tokens. `labels` counts the rows per label for a
    classification, held-out rows included, in the order of the recipe.
    """

    tokens: int
    trained_tokens: int
    lengths: list[LengthBucket]
    length_p50: int
    length_p95: int
    length_max: int
    truncated_rows: int
    dropped_rows: int
    duplicate_rows: int
    duplicates: list[Repeat]
    heldout_overlap_rows: int
    heldout_overlap: list[Repeat]
    stop_rows: int
    stop_token: str | None
    double_bos_rows: int
    chat_template_sha256: str | None
    labels: list[LabelCount] = Field(default_factory=list)


class Plan(Wire):
    """Result of validation: exact counts of the dataset, warnings, and the resolved recipe.

    `rows` counts the valid rows of the training file. `heldout_rows` are scored; they are the validation file, or part
    of the training file. `tokens` and `trained_tokens` count the rows to train on once per epoch, after the cut;
    `longest_row` is in tokens, before the cut. `fit` is null if the memory model does not support the base model's
    architecture. `fallback_levels` is the number of settings, the planned one included, that the trainer can step
    through when memory runs out.
    """

    rows: int
    heldout_rows: int
    tokens: int
    trained_tokens: int
    longest_row: int
    truncated_rows: int
    dropped_rows: int
    warnings: list[str]
    recipe: Recipe
    data: DataReport | None = None
    fit: PlannedFit | None = None
    fallback_levels: int = 1


class Score(Wire):
    """Loss (in nats), accuracy and number of trained tokens on the held-out rows.

    Supervised: `loss` and `token_accuracy` are means over the trained tokens.

    DPO: `loss` is the mean over pairs; it is log 2 if nothing was learned. `token_accuracy` and `tokens` are those of
    the chosen answers. `reward_accuracy` is the share of pairs in which the likelihood of the chosen answer, relative
    to the reference, grew more than that of the rejected one; a tie counts half. `reward_margin` is the mean
    difference, times beta, in nats. `chosen_loss` is the loss of the chosen answers alone, in nats per token.

    Classification: `loss` and `token_accuracy` are means over rows, and `tokens` is the number of rows. `macro_f1` is
    the mean F1 over all labels that occur among the rows or the predictions.
    """

    loss: float
    token_accuracy: float
    tokens: int
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    chosen_loss: float | None = None
    macro_f1: float | None = None

    @computed_field  # type: ignore[prop-decorator]  # mypy rejects decorated properties, pydantic needs one
    @property
    def perplexity(self) -> float | None:
        """e to the power of the loss per token; null for DPO and classification. Capped to stay a finite number."""
        return math.exp(min(self.loss, 700.0)) if self.reward_margin is None and self.macro_f1 is None else None


class Verdict(StrEnum):
    """Where the 95 % interval of the loss change lies.

    `better`: entirely below 0. `same`: it contains 0. `worse`: entirely above 0. `unknown`: a single row gives no
    interval.
    """

    BETTER = "better"
    SAME = "same"
    WORSE = "worse"
    UNKNOWN = "unknown"


class LossChange(Wire):
    """Change of the held-out loss by training: loss after minus loss before. Below 0 is better.

    In nats per token (supervised), per pair (DPO) or per row (classification). `low` and `high` are the bounds of the
    95 % percentile interval of a paired bootstrap: held-out rows are drawn with replacement `resamples` times, each
    with its tokens and both losses. They are null if only one row is held out. `caveats` lists reasons, in words, to
    trust the interval less.
    """

    loss: float
    low: float | None
    high: float | None
    rows: int
    resamples: int
    verdict: Verdict
    caveats: list[str]


class Continuation(Wire):
    """Text that a model generated. `ended` is true if it stopped with a stop token, false if it was cut off."""

    text: Text
    ended: bool


class Sample(Wire):
    """A held-out row's prompt, and its continuation at temperature 0 by the base and by the tuned model.

    `reference` is the row's own continuation. Special tokens are left out, and long texts are shortened. For
    classification, `prompt` is the text, `reference` the row's label, `base` and `tuned` the predicted labels.
    """

    line: int
    prompt: Text
    reference: Text
    base: Continuation
    tuned: Continuation


class Majority(Wire):
    """The majority baseline: the most frequent label of the training rows, and its accuracy on the held-out rows."""

    label: str
    accuracy: float


class FullFineTuning(Wire):
    """Memory that training all parameters in fp32 with AdamW would take, in bytes. Computed, not measured.

    Activations are not included; they come on top.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    total_bytes: int


class Report(Wire):
    """Base against tuned model on the same held-out rows, at the same quantization and precision, and the cost.

    `start` and `start_change` are set if training started from another job's adapter: its score, and the change since.
    `kept_step` is the optimizer step of the published adapter; with early stopping it can be earlier than `steps`.
    `heldout_lines` are the 1-based lines, 200 at most, that were split off the training file; empty with a validation
    file, or if nothing was split off. `base_bytes` is the size in memory of the frozen base, quantized as it was;
    `base_fp32_bytes` is its size in fp32. `train_seconds` counts optimizer steps only, over all attempts.
    `peak_memory_bytes` is of the last attempt; on a CPU it includes the Python interpreter.
    """

    base: Score
    tuned: Score
    change: LossChange
    majority: Majority | None = None
    start: Score | None = None
    start_change: LossChange | None = None
    samples: list[Sample]
    heldout_source: Literal["validation_file", "training_file_carved", "training_file"]
    heldout_lines: list[int]
    quantization: Quantization
    compute_dtype: Literal["bfloat16", "float32"]
    steps: int
    kept_step: int | None = None
    trained_tokens: int
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    base_bytes: int
    base_fp32_bytes: int
    full_finetuning: FullFineTuning
    train_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    fit: MeasuredFit | None = None


class Servable(Wire):
    """Whether vLLM can serve the published files, according to its source code (not tried), and if not, why.

    `max_lora_rank` is the smallest valid value of `--max-lora-rank` for the adapter; null for a fully fine-tuned model.
    """

    servable: bool
    max_lora_rank: int | None
    reasons: list[str]


class Proof(Wire):
    """Verification of the published files by a new process, on the report's held-out rows.

    `base` and `tuned` are scored again. `base_deviation` and `tuned_deviation` are the differences from the report's
    losses in nats; allowed is `tolerance` times the loss, or times 1 nat if the loss is smaller. `max_logit_difference`
    is the largest difference of a logit with and without the adapter. `start_logit_difference` is the largest between
    this adapter and the one that training started from, or null if there is none. `tensors` counts the tensors of the
    adapter or model. `tokenizer_sha256` covers tokenizer, chat template and special tokens.
    """

    base: Score
    tuned: Score
    base_deviation: float
    tuned_deviation: float
    tolerance: float
    max_logit_difference: float
    start_logit_difference: float | None = None
    tensors: int
    tokenizer_sha256: str
    vllm: Servable


class Export(Wire):
    """An export of the adapter, which was loaded and checked before it was published; or the `error` if it failed.

    `path` is its folder among the adapter's files, `bytes` its size. `loss` is on the held-out rows, in nats per
    token (for DPO, of the chosen answers); `difference` is that loss minus the adapter's. `max_logit_difference` is the
    largest difference of a logit from the adapter's on a few rows. `gguf_adapter` has no scores: its tensors equal the
    adapter's bit for bit.
    """

    name: ExportName
    path: str | None = None
    bytes: int | None = None
    loss: float | None = None
    difference: float | None = None
    max_logit_difference: float | None = None
    error: str | None = None


class Metrics(Wire):
    """Metrics of one optimizer step, or of an evaluation after it.

    Losses are in nats per trained token (supervised), per pair (DPO) or per row (classification). Accuracies are per
    token, for classification per row.
    """

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

    def scalars(self) -> dict[str, float]:
        """Return the metrics for a tracker, as `train/NAME` and `valid/NAME`: trackers group charts by this prefix.

        OpenAI's `full_valid_…` are left out, because they equal `valid_…`.
        """
        values: dict[str, float] = self.model_dump(exclude_none=True, exclude={"step", "total_steps"})
        grouped = {}
        for name, value in values.items():
            group = "valid" if name.startswith("valid_") else "train"
            if not name.startswith("full_valid_"):
                grouped[f"{group}/{name.removeprefix(group + '_')}"] = float(value)
        return grouped


class JobError(Wire):
    """Why a job failed. `code`, `message` and `param` are OpenAI's fields.

    `hint` says what to do, `step` is the optimizer step of the failure, `last_log_lines` the end of the trainer's log.
    """

    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    step: int | None = None
    last_log_lines: list[str] = Field(default_factory=list)
