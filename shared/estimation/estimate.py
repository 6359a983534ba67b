"""Estimate a job before it is created: does it fit, how long does it take, and what would make it fit.

Owns: the wire objects of `POST /fine_tuning/estimate`, and what is known of a dataset that was not tokenized. Every
"auto" is resolved by defaults.py, as for a job; the memory arithmetic is in memory_model.py. Pure. Must not know about
HTTP or tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shared.errors import InvalidRequest
from shared.estimation import architecture, defaults, memory_model
from shared.estimation.architecture import Architecture, Config
from shared.estimation.memory_model import Change, Memory, ParameterCount, Setup
from shared.schemas.memory import Kind, Weighing
from shared.schemas.requests import (
    Hyperparameters,
    Lora,
    Method,
    MethodName,
    Quantization,
    Request,
    Text,
    TrainerParams,
    Wire,
)
from shared.schemas.results import Plan

#: English in JSON lines, keys and quotes included; anything from 2 to 6 is common.
BYTES_A_TOKEN = 4
#: Rows assumed where none were counted: enough for the largest "auto" batch, too few for the large rank.
ASSUMED_ROWS = 5_000


class EstimateCreate(Request):
    """The fields of a job, and the device that it would run on.

    `trainer.gradient_checkpointing` "auto" is taken as on for a GPU, off for a CPU. `device_flops` is what the device
    sustains in 16-bit training, in FLOP a second.
    """

    model: Text
    training_file: Text | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    lora: Lora = Lora()
    quantization: Quantization = Quantization.NF4
    trainer: TrainerParams = TrainerParams()
    device: Kind = "cuda"
    device_memory_bytes: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    device_flops: Annotated[float, Field(ge=1e6, le=1e21, allow_inf_nan=False)] | None = None


class Estimate(Wire):
    """Whether a job fits, how long it takes, and what would make it fit. `assumptions` lists what was guessed.

    `max_length` is the longest row in tokens, after the cut. `fits` is null without a device's memory, `tokens` and
    `seconds` are null without a file. `smallest` is the peak with every setting that `change` may name at its minimum.
    """

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    model: str
    parameters: ParameterCount
    memory: Memory
    quantization: Quantization
    r: int
    n_epochs: int | None
    micro_batch: int
    max_length: int
    gradient_checkpointing: bool
    device: Kind
    device_memory_bytes: int | None
    fits: bool | None
    change: Change | None
    smallest: int
    tokens: int | None
    tokens_source: Literal["plan", "file_size"] | None
    flop_per_token: int
    seconds: float | None
    assumptions: list[str]


@dataclass(frozen=True, slots=True)
class Data:
    """What is known of a dataset: from a job's plan on the same base, or from rows and bytes of the file alone.

    `rows` and `tokens` count the rows that are trained on. `longest_row` is the longest row of the file in tokens,
    before the cut; None if no row was tokenized.
    """

    rows: int
    tokens: int
    longest_row: int | None
    source: Literal["plan", "file_size"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request with nothing left at "auto". `longest_row` is in tokens, after the cut to `max_length`."""

    settings: defaults.Settings
    max_length: int
    longest_row: int


def from_plan(plan: Plan) -> Data:
    """A dataset that a job, or a dry run, has tokenized."""
    usable = plan.rows - plan.dropped_rows
    carved = defaults.heldout_rows(usable)
    # With another number of held-out rows, they came from a validation file, or they are the training rows themselves.
    rows = usable - carved if plan.heldout_rows == carved else usable
    return Data(rows=rows, tokens=plan.tokens, longest_row=plan.longest_row, source="plan")


def guess(*, rows: int, size: int) -> Data:
    """A dataset that was not tokenized yet, from the rows and the bytes of its file."""
    tokens = -(-size // BYTES_A_TOKEN)
    return Data(rows=rows - defaults.heldout_rows(rows), tokens=tokens, longest_row=None, source="file_size")


def estimate(
    request: EstimateCreate, config: Config, data: Data | None, weighings: Sequence[Weighing] = ()
) -> Estimate:
    """Estimate a job on the base with this config.json, corrected by earlier runs of the base on such a device.

    Raises InvalidRequest: an unknown architecture, a setting that the base does not support, DPO, full fine-tuning.
    """
    base = architecture.read_config(config)
    assumptions: list[str] = []
    if request.method is not None and request.method.type == "classification":
        if base.causal:
            assumptions.append("the head has two labels")
        base = architecture.classifier(base)
    elif not base.causal:
        assumptions.append("method is classification, the only one for an encoder")
    resolved = resolve(request, base, data)
    settings = resolved.settings
    if data is None or data.longest_row is None:
        assumptions.append(f"the longest row has {resolved.longest_row:,} tokens")
    setup = _setup(request, resolved)
    peak, flop = memory_model.peak_memory(base, setup, weighings), memory_model.flop_per_token(base, setup)
    tokens, seconds = None, None
    if data is not None:
        tokens = min(data.tokens, data.rows * resolved.longest_row)
        seconds = _seconds(request, flop, _trained_tokens(request, settings, data.rows, tokens), assumptions)
        if data.source == "file_size":
            assumptions.append(f"tokens are the file's bytes divided by {BYTES_A_TOKEN}; a dry run counts them")
    if weighings:
        assumptions.append(f"memory is corrected by {len(weighings)} earlier runs of this base on such a device")
    fits = None if request.device_memory_bytes is None else peak.total <= request.device_memory_bytes
    return Estimate(
        model=request.model,
        parameters=memory_model.parameters(base, setup),
        memory=peak,
        quantization=setup.quantization,
        r=setup.r,
        n_epochs=None if data is None else settings.n_epochs,
        micro_batch=setup.micro_batch,
        max_length=setup.max_length,
        gradient_checkpointing=setup.checkpointing,
        device=setup.device,
        device_memory_bytes=request.device_memory_bytes,
        fits=fits,
        change=memory_model.change(base, setup, request.device_memory_bytes or 0, weighings) if fits is False else None,
        smallest=memory_model.smallest(base, setup, weighings),
        tokens=tokens,
        tokens_source=data.source if data else None,
        flop_per_token=flop,
        seconds=seconds,
        assumptions=assumptions,
    )


def resolve(request: EstimateCreate, base: Architecture, data: Data | None) -> Resolved:
    """The numbers that the recipe of such a job would have, with `micro_batch` as it is where no device is known.

    Rows that were not tokenized are assumed to be as long as `max_length` allows. Without rows, ASSUMED_ROWS are
    assumed. Raises InvalidRequest: DPO, full fine-tuning, or `max_length` above the base's context.
    """
    asked = _hyperparameters(request)
    # A causal base has classifier parameters only if the method is classification, an encoder always has them.
    method: MethodName = "classification" if base.classifier else "supervised"
    known = None if data is None else data.longest_row
    longest = defaults.LONGEST_AUTO_ROW if known is None else known
    length = defaults.max_length(request.trainer, context=base.context, longest=longest)
    longest_row = length if known is None else min(length, known)
    rows = (data.rows if data else 0) or ASSUMED_ROWS
    settings = defaults.resolve(method, asked, request.lora, request.trainer, rows=rows, longest_row=longest_row)
    return Resolved(settings, length, longest_row)


def _hyperparameters(request: EstimateCreate) -> Hyperparameters:
    """Those of `method` if it has any, otherwise the ones at the top level, as for a job."""
    if request.trainer.full_finetuning:
        raise InvalidRequest(
            f"full fine-tuning is not estimated: it needs {memory_model.FULL_BYTES} bytes a parameter, and activations",
            param="trainer.full_finetuning",
        )
    if request.method is not None and request.method.type == "dpo":
        raise InvalidRequest("method 'dpo' is not estimated; allowed: supervised, classification", param="method.type")
    if request.method is not None and request.method.settings is not None:
        return request.method.hyperparameters
    return request.hyperparameters or Hyperparameters()


def _setup(request: EstimateCreate, resolved: Resolved) -> Setup:
    asked = request.trainer.gradient_checkpointing
    return Setup(
        quantization=request.quantization,
        r=resolved.settings.r,
        micro_batch=resolved.settings.micro_batch,
        max_length=resolved.longest_row,
        target_modules=request.lora.target_modules,
        use_dora=request.lora.use_dora,
        dropout=request.lora.dropout,
        packing=resolved.settings.packing,
        checkpointing=defaults.checkpointing(request.device) if asked == "auto" else asked,
        device=request.device,
    )


def _trained_tokens(request: EstimateCreate, settings: defaults.Settings, rows: int, tokens: int) -> int:
    """Tokens of the whole run, where `tokens` are those of one epoch."""
    total = tokens * settings.n_epochs
    if request.trainer.max_steps is None:
        return total
    return min(total, round(settings.total_steps * settings.batch_size * tokens / max(rows, 1)))


def _seconds(request: EstimateCreate, flop: int, tokens: int, assumptions: list[str]) -> float:
    device = memory_model.DEVICE_PROFILES[request.device]
    flops = request.device_flops or device.flops
    origin = "" if request.device_flops else f" ({device.described})"
    assumptions.append(f"{flops / 1e12:,.4g} TFLOP/s sustained{origin}; loading and evaluation come on top")
    return round(flop * tokens / flops, 1)
