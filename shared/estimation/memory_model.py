"""Will it fit: peak memory and time of a LoRA run, by arithmetic on a base's architecture, before any GPU is held.

Owns: the memory model, the FLOP of a token, and the one change that makes a run fit. Pure: no torch, no file, no clock.
The model is of our own trainer on one device; tests/shared/test_fit.py holds it against allocations that were measured
and against published figures. Bytes are bytes, GB are 1e9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shared.errors import InvalidRequest
from shared.estimation.architecture import Architecture, Linear
from shared.estimation.correction import corrected
from shared.schemas.memory import Kind, Weighing
from shared.schemas.requests import Quantization, Wire

#: Compute, and whatever of the base is not quantized, is bf16; the adapter, its gradient and AdamW's two moments fp32.
COMPUTE_BYTES = 2
ADAPTER_BYTES = 16
#: Of a parameter that is trained itself (`trainer.full_finetuning`): its weight in fp32, a gradient and two moments of
#: it; the gradient of a micro-batch before it is added; and the base's own weight, to compare with.
FULL_BYTES = ADAPTER_BYTES + 4 + COMPUTE_BYTES
#: NF4 with double quantization, as bitsandbytes stores it: 4 bits an element, an 8-bit scale a block of 64, an fp32
#: scale a 256 of those, and for each matrix two code books (16 and 256 fp32) and an offset. 0.5159 bytes an element.
NF4_BLOCK, NF4_SCALES = 64, 256
NF4_BOOKS = 4 * (16 + 256 + 1)
#: Logits in 16 bits, and in fp32, where their gradient is written over them; a cap has a slope of their size.
LOGIT_BYTES = 6
#: A packed row is reckoned to be at least this long (`PACK_LENGTH` of worker/trainer/planning/recipe.py).
PACK_LENGTH = 128

SHORTEST_ROW = 64
FEWEST_BITS = (Quantization.NONE, Quantization.INT8, Quantization.NF4)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What the trainer does on a kind of device, and what the device costs and gives.

    `context_bytes` are there before anything is loaded. `chunk_bytes` of fp32 logits are held at once (`CHUNK_BYTES` of
    worker/trainer/forward/log_likelihood.py); 4-bit matrices stay dequantized up to `resident_bytes` (`RESIDENT_BYTES`
    of worker/trainer/model/fused_lora.py). What comes and goes takes `moving` times what the model counts. `flops` are
    sustained in 16-bit training, a second.
    """

    context_bytes: int
    moving: float
    chunk_bytes: int
    resident_bytes: int
    flops: float
    described: str


DEVICE_PROFILES: dict[Kind, DeviceProfile] = {
    # A context with its kernels and workspaces takes 0.15 to 0.5 GB.
    # Blocks that come and go leave gaps.
    "cuda": DeviceProfile(500_000_000, 1.05, 256 * 1024**2, 0, 0.4 * 312e12, "two fifths of an A100's peak"),
    # An interpreter with torch and transformers; SmolLM2 at 626 tokens/s on two cores is 0.34 TFLOP/s.
    # The heap's gaps are wide on a CPU: 1.07 to 1.28 was measured, its fused layers included, by shape of the batch.
    "cpu": DeviceProfile(480_000_000, 1.15, 24 * 1024**2, 512 * 1024**2, 0.34e12, "two cores with bf16 instructions"),
}


@dataclass(frozen=True, slots=True)
class Setup:
    """What memory and time depend on, with nothing left at "auto". `max_length` is the tokens of the longest row."""

    quantization: Quantization
    r: int
    micro_batch: int
    max_length: int
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    use_dora: bool = False
    dropout: float = 0.0
    packing: bool = True
    checkpointing: bool = True
    device: Kind = "cuda"

    @property
    def row(self) -> int:
        return max(self.max_length, PACK_LENGTH) if self.packing else self.max_length

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.micro_batch * self.row


class ParameterCount(Wire):
    """`linear` is what quantization packs; `embedding` includes an untied head; `trained` is the adapter's, in fp32."""

    total: int
    linear: int
    embedding: int
    other: int
    trained: int


class Memory(Wire):
    """Bytes at the moment of the peak; they add up to `total`. `head` is 0 where the peak is inside a layer.

    `overhead` is the device's context and fragmentation; what torch says it has allocated is the rest. `correction` is
    what earlier runs of the base on such a device took beyond all of that, or below 0, less.
    """

    weights: int
    adapter: int
    activations: int
    head: int
    dequantized: int
    overhead: int
    correction: int = 0
    total: int


class Change(Wire):
    """A setting that, changed alone, makes a run fit, and the peak that it leads to."""

    param: str
    value: int | bool | Quantization
    total: int


def parameters(base: Architecture, setup: Setup) -> ParameterCount:
    """Counts of the base as it is loaded, and of what is trained. Raises InvalidRequest: a target that is not there."""
    return ParameterCount(
        total=base.total,
        linear=base.linear,
        embedding=base.embedding + base.head,
        other=base.other + base.classifier,
        trained=trained(base, setup),
    )


def trained(base: Architecture, setup: Setup) -> int:
    """Parameters of the adapter (Hu et al. 2021; DoRA's magnitudes: Liu et al. 2024), and of a classifier's head."""
    adapted = targets(base, setup)
    lora = sum(setup.r * (linear.inputs + linear.outputs) for linear in adapted)
    magnitudes = sum(linear.outputs for linear in adapted) if setup.use_dora else 0
    return lora + magnitudes + base.classifier


def targets(base: Architecture, setup: Setup) -> list[Linear]:
    """The matrices that bear an adapter: a name means every module whose path ends in it, as in peft."""
    if isinstance(setup.target_modules, str):
        return list(base.linears)
    for target in setup.target_modules:
        if not any(_names(target, linear) for linear in base.linears):
            names = sorted({linear.path.rpartition(".")[2] for linear in base.linears})
            raise InvalidRequest(
                f'target_modules: {target!r} names no linear module of this base; allowed: "all-linear", or some of '
                f"{', '.join(names)}",
                param="lora.target_modules",
                code="invalid_lora",
            )
    return [linear for linear in base.linears if any(_names(target, linear) for target in setup.target_modules)]


def weights(base: Architecture, quantization: Quantization, *, element_bytes: int = COMPUTE_BYTES) -> int:
    """Bytes of the resident base; `element_bytes` for all that is not quantized."""
    rest = base.total - base.linear
    return sum(_matrix(linear, quantization, element_bytes) for linear in base.linears) + element_bytes * rest


def peak_memory(base: Architecture, setup: Setup, weighings: Sequence[Weighing] = ()) -> Memory:
    """The peak of one micro-batch's forward and backward; the optimizer's step comes when the activations are gone.

    Corrected by what earlier runs of this base took on such a device.
    """
    adapter = ADAPTER_BYTES * trained(base, setup)
    activations, head = _moving(base, setup)
    dequantized = _dequantized(base, setup)
    device = DEVICE_PROFILES[setup.device]
    overhead = device.context_bytes + round((device.moving - 1) * (activations + head))
    base_bytes = weights(base, setup.quantization)
    computed = base_bytes + adapter + activations + head + dequantized + overhead
    total = corrected(weighings, computed)
    return Memory(
        weights=base_bytes,
        adapter=adapter,
        activations=activations,
        head=head,
        dequantized=dequantized,
        overhead=overhead,
        correction=total - computed,
        total=total,
    )


def flop_per_token(base: Architecture, setup: Setup) -> int:
    """FLOP of a token's forward and backward, each token trained on.

    A frozen matrix costs 2 a parameter forward and 2 for the gradient of its input; a trained one 2 more for its own;
    checkpointing the forward again, but for the head. Attention's two products cost 4 a pair and unit of width forward
    and twice that backward; half of the pairs are masked in a causal model.
    """
    again = 2 if setup.checkpointing else 0
    head = 0 if base.classifier else base.vocabulary * base.hidden
    pairs = base.layers * base.query * setup.row // (2 if base.causal else 1)
    matrices = (4 + again) * base.linear + (6 + again) * trained(base, setup) + 4 * head
    return matrices + (12 + 2 * again) * pairs


def change(base: Architecture, setup: Setup, device_bytes: int, weighings: Sequence[Weighing] = ()) -> Change | None:
    """The first single setting that makes it fit, changed no more than it must be; None if none does.

    What costs least comes first: rows at a time, checkpointing (half as much time again), length (cut rows), bits.
    """
    for param, value, narrower in _narrower(setup):
        total = peak_memory(base, narrower, weighings).total
        if total <= device_bytes:
            return Change(param=param, value=value, total=total)
    return None


def smallest(base: Architecture, setup: Setup, weighings: Sequence[Weighing] = ()) -> int:
    """The peak with all of these settings at their least: on less memory, this base cannot be trained at this rank."""
    least = replace(
        setup,
        micro_batch=1,
        checkpointing=True,
        max_length=min(setup.max_length, SHORTEST_ROW),
        quantization=Quantization.NF4,
    )
    return peak_memory(base, least, weighings).total


def _narrower(setup: Setup) -> Iterator[tuple[str, int | bool | Quantization, Setup]]:
    """Every single change that takes less memory, in the order of `change`, the smallest step first."""
    for i in range(1, setup.micro_batch.bit_length()):
        rows = setup.micro_batch >> i
        yield "trainer.micro_batch", rows, replace(setup, micro_batch=rows)
    if not setup.checkpointing:
        yield "trainer.gradient_checkpointing", True, replace(setup, checkpointing=True)
    for length in range((setup.max_length - 1) // SHORTEST_ROW * SHORTEST_ROW, 0, -SHORTEST_ROW):
        yield "trainer.max_length", length, replace(setup, max_length=length)
    for quantization in FEWEST_BITS[FEWEST_BITS.index(setup.quantization) + 1 :]:
        yield "quantization", quantization, replace(setup, quantization=quantization)


def _moving(base: Architecture, setup: Setup) -> tuple[int, int]:
    """Activations and the head's share of them, at whichever moment is the worst.

    That is either inside the last layer, where its gradients (12 hidden + 6 feed-forward bytes a token, and 2 a score
    that is kept, as counted in the allocator) join what it stored; or in the head, above layers that hold all they
    stored, or with checkpointing nothing but their inputs.
    """
    tokens, h = setup.tokens, base.hidden
    layer = _stored(base, setup)
    gradients = 12 * h + 6 * base.feed_forward + (2 * base.heads * setup.row if base.scores else 0)
    chunk = max(1, DEVICE_PROFILES[setup.device].chunk_bytes // (4 * base.vocabulary))
    logits = (LOGIT_BYTES + 4 * base.caps_logits) * base.vocabulary * min(tokens, chunk)
    head = tokens * 10 * h + (0 if base.classifier else logits)
    # The adapter is cast to 16 bits once a forward.
    casts = COMPUTE_BYTES * trained(base, setup)
    if setup.checkpointing:
        kept, inside = tokens * base.layers * COMPUTE_BYTES * h, tokens * (layer + gradients)
    else:
        kept, inside = tokens * base.layers * layer, tokens * gradients
    return (kept + casts + inside, 0) if inside >= head else (kept + casts, head)


def _stored(base: Architecture, setup: Setup) -> int:
    """Bytes that one layer keeps of one token for its backward, the adapter's included."""
    adapted = targets(base, setup)
    inputs, outputs = (
        sum(sizes) // base.layers for sizes in zip(*((x.inputs, x.outputs) for x in adapted), strict=True)
    )
    lora = COMPUTE_BYTES * setup.r * len(adapted) // base.layers
    # A dropped-out copy of the input and its mask; DoRA's base output, scaled and as it was.
    dropout = 4 * inputs if setup.dropout else 0
    dora = 4 * outputs if setup.use_dora else 0
    return base.stored + base.scores * base.heads * setup.row + lora + dropout + dora


def _dequantized(base: Architecture, setup: Setup) -> int:
    """Bytes of matrices that are unpacked at a time: those that stay so, and the one that is at work."""
    if setup.quantization is Quantization.NONE:
        return 0
    largest = COMPUTE_BYTES * max(linear.elements for linear in base.linears)
    room = DEVICE_PROFILES[setup.device].resident_bytes if setup.quantization is Quantization.NF4 else 0
    return min(COMPUTE_BYTES * base.linear, room + largest)


def _matrix(linear: Linear, quantization: Quantization, element_bytes: int) -> int:
    if quantization is Quantization.NF4:
        blocks = math.ceil(linear.elements / NF4_BLOCK)
        return math.ceil(linear.elements / 2) + blocks + 4 * math.ceil(blocks / NF4_SCALES) + NF4_BOOKS
    if quantization is Quantization.INT8:
        return linear.elements + 4 * linear.outputs
    return element_bytes * linear.elements


def _names(target: str, linear: Linear) -> bool:
    return f".{linear.path}".endswith(f".{target}")
