"""What training resolves, counts, measures and proves, or why it failed: on the wire, on the pipe, as JSON on a job.

Must not know about HTTP, tables or torch.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

from pydantic import Field, computed_field

from shared.schemas.memory import MeasuredFit, PlannedFit
from shared.schemas.requests import ExportName, MethodName, Quantization, Text, Wire


class Recipe(Wire):
    """Every number that training uses, resolved before the job is queued and shown on it. `beta` is DPO's.

    `labels` are a classification's: the model answers with a label's place in this list.
    With `full_finetuning` all weights are trained: `r` and `alpha` are 0, and the rest of the LoRA's is not used.
    `gradient_checkpointing` is null where no device was known: then a GPU does it and a CPU does not.
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


class LengthBucket(Wire):
    """How many rows are of at most `upto` tokens, a power of two, and of more than the bucket before."""

    upto: int
    rows: int


class Repeat(Wire):
    """A row that is, token for token and label for label, the one of line `of`."""

    line: int
    of: int


class LabelCount(Wire):
    """How many rows have this label."""

    label: str
    rows: int


class DataReport(FileReport):
    """The training file as tokens. `rows` are all that can be trained on; `bad_rows` were skipped at the user's word.

    Tokens and lengths are those of whole rows, before the cut. `dropped_rows` have nothing trained left after it.
    `stop_rows` of those that are kept end in a trained stop token, mostly `stop_token`. `duplicates` and
    `heldout_overlap` name the first lines; the latter are held-out rows that are trained on as well. `labels` are those
    of a classification in the order of the recipe; rows that are held out are counted too.
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
    """What a `prepare` worker found in the dataset, and the recipe that follows from it. Counts are exact.

    `fit` is null for a base whose architecture shared/estimation/architecture.py does not know.
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
    """Mean over the trained tokens of the held-out rows; loss in nats.

    Of DPO the loss is the mean over pairs, which is log 2 where nothing was learned; accuracy and tokens are those of
    the chosen answers. `reward_accuracy` is the share of pairs whose chosen answer gained on the rejected one, ties
    halved, and `reward_margin` by how much, times beta, in nats; `chosen_loss` is the chosen answers' own, in nats a
    token.

    Of classification all is counted in rows, one label each: loss and accuracy are means over them, `tokens` their
    number. `macro_f1` is the mean over the labels that they have, or were given, of the F1 of each.
    """

    loss: float
    token_accuracy: float
    tokens: int
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    chosen_loss: float | None = None
    macro_f1: float | None = None

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property, pydantic asks for one
    @property
    def perplexity(self) -> float | None:
        """e to the loss of a token, held below what a JSON number can be; a loss of pairs or of labels has none."""
        return math.exp(min(self.loss, 700.0)) if self.reward_margin is None and self.macro_f1 is None else None


class Verdict(StrEnum):
    """What the interval of the change says: it lies below 0, holds it, lies above; or one row gives none."""

    BETTER = "better"
    SAME = "same"
    WORSE = "worse"
    UNKNOWN = "unknown"


class LossChange(Wire):
    """Tuned loss minus base loss, in nats a token, of DPO a pair, of classification a row: below 0 is better.

    `low` and `high` are the 95 % percentile interval of a paired bootstrap: rows are drawn with replacement `resamples`
    times, each bringing the tokens and both losses that it has. None where a single row was held out. `caveats` say in
    words what the interval does not know.
    """

    loss: float
    low: float | None
    high: float | None
    rows: int
    resamples: int
    verdict: Verdict
    caveats: list[str]


class Continuation(Wire):
    """What a model wrote. `ended`: it came to a stop token by itself, and was not cut."""

    text: Text
    ended: bool


class Sample(Wire):
    """A held-out row's prompt, continued at temperature 0; without special tokens, and long texts shortened.

    Of classification the prompt is the text, the rest are labels: the row's own, and those that the models gave it.
    """

    line: int
    prompt: Text
    reference: Text
    base: Continuation
    tuned: Continuation


class Majority(Wire):
    """What there is to beat: the label of most training rows, and the share of the held-out rows that have it."""

    label: str
    accuracy: float


class FullFineTuning(Wire):
    """What training every parameter in fp32 with AdamW would hold, by arithmetic: nobody measured it.

    Activations come on top, as they do in the job's own peak.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    total_bytes: int


class Report(Wire):
    """Base against tuned, on the same rows, with the same weights and precision; and what it took.

    A job that went on from another's adapter has the score of that as `start`, and in `start_change` what it made of
    it. `kept_step` is the step whose adapter this is: not the last of `steps` where early stopping found a better one.
    `heldout_lines` are the 1-based lines that were carved out of the training file, 200 at most; with a validation
    file, or where none was carved, there are none to name. `base_bytes` are those of the frozen base as it was held,
    `base_fp32_bytes` what it would be unquantized. `train_seconds` are spent in optimizer steps, over all attempts;
    `peak_memory_bytes` is of the last attempt, with the interpreter on a CPU.
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
    """Whether vLLM takes what is published, by its source; the least that `--max-lora-rank` must say for an adapter."""

    servable: bool
    max_lora_rank: int | None
    reasons: list[str]


class Proof(Wire):
    """What a clean process saw of the published files, on the report's held-out rows.

    `base` and `tuned` were measured anew; a loss may be off the report's by `tolerance`, as a share of it or of one nat
    where it is less. `max_logit_difference` is the largest that the adapter makes on a row, and
    `start_logit_difference` the largest that training has made, where it began with another job's adapter.
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
    """A form that the adapter was published in besides, loaded again before it was; or why there is none (`error`).

    `path` is where it begins among the adapter's files. `loss` is on the held-out rows, in nats a token, of DPO over
    the chosen answers; `difference` is that loss less the adapter's own, and `max_logit_difference` the largest between
    the two on a few rows. Nothing is scored of an adapter in GGUF: its tensors are the adapter's, bit for bit.
    """

    name: ExportName
    path: str | None = None
    bytes: int | None = None
    loss: float | None = None
    difference: float | None = None
    max_logit_difference: float | None = None
    error: str | None = None


class Metrics(Wire):
    """One optimizer step, or an evaluation at that step. Losses in nats per trained token, of DPO per pair.

    Of classification they are per row, and so are the accuracies.
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
        """As trackers want them, which make a chart of each name and a group of what comes before a slash.

        OpenAI's `full_valid_…` are left out: they are the `valid_…` once more.
        """
        found: dict[str, float] = self.model_dump(exclude_none=True, exclude={"step", "total_steps"})
        grouped = {}
        for name, value in found.items():
            group = "valid" if name.startswith("valid_") else "train"
            if not name.startswith("full_valid_"):
                grouped[f"{group}/{name.removeprefix(group + '_')}"] = float(value)
        return grouped


class JobError(Wire):
    """Why a job failed. `code`, `message`, `param` are OpenAI's; the rest is ours."""

    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    step: int | None = None
    last_log_lines: list[str] = Field(default_factory=list)
