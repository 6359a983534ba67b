"""The verdict before a job: what is asked, and what fit.py's arithmetic answers.

Owns: the wire objects of `POST /fine_tuning/estimate`, and what "auto" comes to while nobody has tokenized the data.
Pure. Must not know about HTTP or tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shared.errors import InvalidRequest
from shared.estimation import architecture, memory_model
from shared.estimation.architecture import Architecture, Config
from shared.estimation.memory_model import Change, Memory, ParameterCount, Setup
from shared.schemas.memory import Kind, Weighing
from shared.schemas.requests import Hyperparameters, Lora, Method, Quantization, Request, Text, TrainerParams, Wire

#: English in JSON lines, keys and quotes included; anything from 2 to 6 is common.
BYTES_A_TOKEN = 4
#: What the recipe takes for "auto" (worker/trainer/planning/recipe.py), where the rows are as long as it lets them be.
LONGEST_AUTO_ROW = 2048
MICRO_BATCH_TOKENS = 1536
LARGEST_AUTO_BATCH = 32
MANY_ROWS = 20_000


class EstimateCreate(Request):
    """A job's own fields, and what it would run on.

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
    """Will it fit, how long, and what would make it fit; `assumptions` says what was guessed.

    `fits` is null without a device's memory, `tokens` and `seconds` without a file. `smallest` is the peak with every
    setting that `change` may touch at its least.
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
    """What is known of a dataset: from a job's plan on the same base, or rows and bytes of the file alone."""

    rows: int
    tokens: int
    longest_row: int | None
    source: Literal["plan", "file_size"]


def guess(*, rows: int, size: int) -> Data:
    """A dataset that nobody has tokenized yet."""
    return Data(rows=rows, tokens=-(-size // BYTES_A_TOKEN), longest_row=None, source="file_size")


def estimate(
    request: EstimateCreate, config: Config, data: Data | None, weighings: Sequence[Weighing] = ()
) -> Estimate:
    """The answer for a base's config.json, corrected by what its runs took on such a device.

    Raises InvalidRequest: an unknown architecture, a setting it cannot bear.
    """
    base = architecture.read_config(config)
    classifies = request.method is not None and request.method.type == "classification"
    if classifies:
        base = architecture.classifier(base)
    asked = _knobs(request)
    assumptions: list[str] = ["the head has two labels"] if classifies and base.causal else []
    setup = _setup(request, asked, base, data, assumptions)
    peak, flop = memory_model.peak_memory(base, setup, weighings), memory_model.flop_per_token(base, setup)
    n_epochs, tokens, seconds = None, None, None
    if data is not None:
        n_epochs = _n_epochs(data.rows, classifies=classifies) if asked.n_epochs == "auto" else asked.n_epochs
        tokens = min(data.tokens, data.rows * setup.max_length)
        seconds = _seconds(request, flop, _trained_tokens(request, asked, data, tokens, n_epochs), assumptions)
        if data.source == "file_size":
            assumptions.append(f"tokens are the file's bytes divided by {BYTES_A_TOKEN}; a dry run counts them")
    if weighings:
        assumptions.append(f"corrected by what {len(weighings)} earlier runs of this base took on such a device")
    fits = None if request.device_memory_bytes is None else peak.total <= request.device_memory_bytes
    return Estimate(
        model=request.model,
        parameters=memory_model.parameters(base, setup),
        memory=peak,
        quantization=setup.quantization,
        r=setup.r,
        n_epochs=n_epochs,
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


def _knobs(request: EstimateCreate) -> Hyperparameters:
    """Those of `method` before their old twin at the top, as for a job."""
    if request.trainer.full_finetuning:
        raise InvalidRequest(
            f"full fine-tuning is not estimated: it holds {memory_model.FULL_BYTES} bytes a parameter, and activations",
            param="trainer.full_finetuning",
        )
    if request.method is not None and request.method.type == "dpo":
        raise InvalidRequest("method 'dpo' is not estimated; allowed: supervised, classification", param="method.type")
    if request.method is not None and request.method.settings is not None:
        return request.method.hyperparameters
    return request.hyperparameters or Hyperparameters()


def _setup(
    request: EstimateCreate, asked: Hyperparameters, base: Architecture, data: Data | None, assumptions: list[str]
) -> Setup:
    lora, trainer, checkpointing = request.lora, request.trainer, request.trainer.gradient_checkpointing
    if trainer.max_length != "auto" and base.context is not None and trainer.max_length > base.context:
        raise InvalidRequest(
            f"max_length is {trainer.max_length:,}; this base attends to at most {base.context:,} tokens",
            param="trainer.max_length",
            code="invalid_max_length",
        )
    longest = data.longest_row if data else None
    length = (
        min(LONGEST_AUTO_ROW, base.context or LONGEST_AUTO_ROW) if trainer.max_length == "auto" else trainer.max_length
    )
    if longest is not None:
        length = min(length, longest)
    else:
        assumptions.append(f"the longest row has {length:,} tokens")
    packing = trainer.packing and not base.classifier
    row = max(length, memory_model.PACK_LENGTH) if packing else length
    batch = LARGEST_AUTO_BATCH if asked.batch_size == "auto" else asked.batch_size
    micro_batch = (
        max(1, min(batch, MICRO_BATCH_TOKENS // row)) if trainer.micro_batch == "auto" else trainer.micro_batch
    )
    many = data is not None and data.rows >= MANY_ROWS
    return Setup(
        quantization=request.quantization,
        r=(32 if many else 16) if lora.r == "auto" else lora.r,
        micro_batch=micro_batch,
        max_length=length,
        target_modules=lora.target_modules,
        use_dora=lora.use_dora,
        dropout=lora.dropout,
        packing=packing,
        checkpointing=request.device == "cuda" if checkpointing == "auto" else checkpointing,
        device=request.device,
    )


def _n_epochs(rows: int, *, classifies: bool) -> int:
    if classifies:
        return 10 if rows < 1_000 else 5 if rows < 10_000 else 3
    return 3 if rows < 1_000 else 2 if rows < 10_000 else 1


def _trained_tokens(request: EstimateCreate, asked: Hyperparameters, data: Data, tokens: int, n_epochs: int) -> int:
    """Of the whole run, with `max_steps` where a batch is known."""
    total, steps = tokens * n_epochs, request.trainer.max_steps
    if steps is None or asked.batch_size == "auto":
        return total
    return min(total, round(steps * asked.batch_size * tokens / max(data.rows, 1)))


def _seconds(request: EstimateCreate, flop: int, tokens: int, assumptions: list[str]) -> float:
    device = memory_model.DEVICE_PROFILES[request.device]
    flops = request.device_flops or device.flops
    origin = "" if request.device_flops else f" ({device.described})"
    assumptions.append(f"{flops / 1e12:,.4g} TFLOP/s sustained{origin}; loading and evaluation come on top")
    return round(flop * tokens / flops, 1)
