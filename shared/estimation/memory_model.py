"""Predict peak memory and time of a LoRA run by arithmetic on its base's architecture.

Owns: the memory model, the FLOP of a token, and the single change that makes a run fit. Pure: no torch, no file, no
clock. It models our own trainer on one device; tests/shared/estimation/test_memory_model.py compares it with measured
allocations and published figures. Memory is in bytes; 1 GB is 1e9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shared.errors import InvalidRequest
from shared.estimation.architecture import Architecture, Linear
from shared.estimation.correction import corrected
from shared.estimation.defaults import CHUNK_BYTES, RESIDENT_BYTES, packed_row
from shared.schemas.memory import Kind, Weighing
from shared.schemas.requests import Quantization, Wire

#: Bytes of an element. Compute, and parameters of the base that are not quantized, are in bf16.
COMPUTE_BYTES = 2
#: Bytes of an adapter's parameter: its weight, its gradient and AdamW's two moments, all in fp32.
ADAPTER_BYTES = 16
#: Bytes of a parameter with `trainer.full_finetuning`: the same 16, the fp32 gradient of a micro-batch before it is
#: added, and the base's own bf16 weight, kept for comparison.
FULL_BYTES = ADAPTER_BYTES + 4 + COMPUTE_BYTES
#: NF4 with double quantization, as bitsandbytes stores it: 4 bits an element, an 8-bit scale for each block of 64, an
#: fp32 scale for each 256 blocks, and for each matrix two code books (16 and 256 fp32 values) and an offset. In total
#: 0.5159 bytes an element.
NF4_BLOCK, NF4_SCALES = 64, 256
NF4_BOOKS = 4 * (16 + 256 + 1)
#: Bytes of a logit: in 16 bits, and in fp32, where its gradient overwrites it. A cap on logits adds an fp32 slope.
LOGIT_BYTES = 6

#: `change` tries multiples of this many tokens as `max_length`.
LENGTH_STEP = 64
MOST_TO_FEWEST_BITS = (Quantization.NONE, Quantization.INT8, Quantization.NF4)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a kind of device adds to the model: fixed memory, fragmentation, buffer sizes, speed.

    `context_bytes` are in use before a model is loaded. Activations and logits take `fragmentation` times the bytes
    that the model counts. `chunk_bytes` of fp32 logits are in memory at a time; `resident_bytes` of 4-bit matrices
    stay dequantized. `flops` is sustained in 16-bit training, in FLOP a second.
    """

    context_bytes: int
    fragmentation: float
    chunk_bytes: int
    resident_bytes: int
    flops: float
    described: str


DEVICE_PROFILES: dict[Kind, DeviceProfile] = {
    # A CUDA context with its kernels and workspaces takes 0.15 to 0.5 GB. Freed blocks leave gaps in the allocator.
    "cuda": DeviceProfile(500_000_000, 1.05, CHUNK_BYTES["cuda"], 0, 0.4 * 312e12, "two fifths of an A100's peak"),
    # The interpreter with torch and transformers; SmolLM2 at 626 tokens/s on two cores is 0.34 TFLOP/s.
    # Gaps in the heap are larger on a CPU: 1.07 to 1.28 was measured with fused layers, depending on the batch's shape.
    "cpu": DeviceProfile(
        480_000_000, 1.15, CHUNK_BYTES["cpu"], RESIDENT_BYTES, 0.34e12, "two cores with bf16 instructions"
    ),
}


@dataclass(frozen=True, slots=True)
class Setup:
    """What memory and time depend on, with nothing left at "auto". `max_length` is the longest row in tokens."""

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
        """Tokens of a row of the batch."""
        return packed_row(self.max_length) if self.packing else self.max_length

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass."""
        return self.micro_batch * self.row


class ParameterCount(Wire):
    """`linear` can be quantized; `embedding` includes an untied head; `trained` counts the adapter, in fp32."""

    total: int
    linear: int
    embedding: int
    other: int
    trained: int


class Memory(Wire):
    """Bytes at the time of the peak; the parts add up to `total`. `head` is 0 where the peak is inside a layer.

    `overhead` is the device's context and fragmentation; torch reports the other parts as allocated. `correction` is
    measured minus computed bytes of earlier runs of the base on such a device.
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
    """A setting that makes a run fit if it alone is changed, and the peak with it."""

    param: str
    value: int | bool | Quantization
    total: int


def parameters(base: Architecture, setup: Setup) -> ParameterCount:
    """Count the parameters of the base and of the adapter. Raises InvalidRequest: an unknown target module."""
    return ParameterCount(
        total=base.total,
        linear=base.linear,
        embedding=base.embedding + base.head,
        other=base.other + base.classifier,
        trained=trained(base, setup),
    )


def trained(base: Architecture, setup: Setup) -> int:
    """Count the trained parameters: the adapter (Hu et al. 2021; DoRA's magnitudes: Liu et al. 2024) and a classifier's
    head. Raises InvalidRequest: an unknown target module.
    """
    adapted = targets(base, setup)
    lora = sum(setup.r * (linear.inputs + linear.outputs) for linear in adapted)
    magnitudes = sum(linear.outputs for linear in adapted) if setup.use_dora else 0
    return lora + magnitudes + base.classifier


def targets(base: Architecture, setup: Setup) -> list[Linear]:
    """The matrices that get an adapter. A name matches every module whose path ends in it, as in peft.

    Raises InvalidRequest: a name that matches no module.
    """
    if isinstance(setup.target_modules, str):
        return list(base.linears)
    for target in setup.target_modules:
        if not any(_matches(target, linear) for linear in base.linears):
            names = sorted({linear.path.rpartition(".")[2] for linear in base.linears})
            raise InvalidRequest(
                f'target_modules: {target!r} names no linear module of this base; allowed: "all-linear", or some of '
                f"{', '.join(names)}",
                param="lora.target_modules",
                code="invalid_lora",
            )
    return [linear for linear in base.linears if any(_matches(target, linear) for target in setup.target_modules)]


def weights(base: Architecture, quantization: Quantization, *, element_bytes: int = COMPUTE_BYTES) -> int:
    """Bytes of the base in memory, with `element_bytes` for each parameter that is not quantized."""
    rest = base.total - base.linear
    return sum(_matrix(linear, quantization, element_bytes) for linear in base.linears) + element_bytes * rest


def peak_memory(base: Architecture, setup: Setup, weighings: Sequence[Weighing] = ()) -> Memory:
    """Predict the peak of a micro-batch's forward and backward, corrected by earlier runs of the base on such a device.

    The optimizer's step needs less: activations are freed by then. Raises InvalidRequest: an unknown target module.
    """
    adapter = ADAPTER_BYTES * trained(base, setup)
    activations, head = _activations(base, setup)
    dequantized = _dequantized(base, setup)
    device = DEVICE_PROFILES[setup.device]
    overhead = device.context_bytes + round((device.fragmentation - 1) * (activations + head))
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
    """FLOP of a token's forward and backward, where every token is trained.

    A frozen matrix costs 2 FLOP a parameter forward and 2 for the gradient of its input; a trained one 2 more for its
    own gradient. Checkpointing adds a second forward, except for the head. Attention's two products cost 4 FLOP for
    each pair of tokens and unit of width forward, and twice that backward. A causal model masks half of the pairs.
    """
    recomputed = 2 if setup.checkpointing else 0
    head = 0 if base.classifier else base.vocabulary * base.hidden
    pairs = base.layers * base.query * setup.row // (2 if base.causal else 1)
    matrices = (4 + recomputed) * base.linear + (6 + recomputed) * trained(base, setup) + 4 * head
    return matrices + (12 + 2 * recomputed) * pairs


def change(base: Architecture, setup: Setup, device_bytes: int, weighings: Sequence[Weighing] = ()) -> Change | None:
    """The cheapest single change, as small as possible, with which the run fits; None if there is none.

    In order of cost: a smaller micro-batch, checkpointing (half as much time again), `max_length` (rows are cut), fewer
    bits.
    """
    for param, value, narrower in _narrower(setup):
        total = peak_memory(base, narrower, weighings).total
        if total <= device_bytes:
            return Change(param=param, value=value, total=total)
    return None


def smallest(base: Architecture, setup: Setup, weighings: Sequence[Weighing] = ()) -> int:
    """The peak with all of these settings at their minimum: with less memory, no run of this base and rank fits."""
    minimal = replace(
        setup,
        micro_batch=1,
        checkpointing=True,
        max_length=min(setup.max_length, LENGTH_STEP),
        quantization=Quantization.NF4,
    )
    return peak_memory(base, minimal, weighings).total


def _narrower(setup: Setup) -> Iterator[tuple[str, int | bool | Quantization, Setup]]:
    """Every single change that needs less memory, in the order of `change`, the smallest step first."""
    for i in range(1, setup.micro_batch.bit_length()):
        rows = setup.micro_batch >> i
        yield "trainer.micro_batch", rows, replace(setup, micro_batch=rows)
    if not setup.checkpointing:
        yield "trainer.gradient_checkpointing", True, replace(setup, checkpointing=True)
    for length in range((setup.max_length - 1) // LENGTH_STEP * LENGTH_STEP, 0, -LENGTH_STEP):
        yield "trainer.max_length", length, replace(setup, max_length=length)
    for quantization in MOST_TO_FEWEST_BITS[MOST_TO_FEWEST_BITS.index(setup.quantization) + 1 :]:
        yield "quantization", quantization, replace(setup, quantization=quantization)


def _activations(base: Architecture, setup: Setup) -> tuple[int, int]:
    """Bytes of activations in the layers, and in the head, at the time of the peak.

    The peak is either inside the last layer, where its gradients (12 hidden + 6 feed-forward bytes a token, and 2 for
    each stored score, as counted in the allocator) are added to its stored activations; or in the head, while the
    layers keep all stored activations, or with checkpointing only their inputs.
    """
    tokens, h = setup.tokens, base.hidden
    layer = _stored(base, setup)
    gradients = 12 * h + 6 * base.feed_forward + (2 * base.heads * setup.row if base.scores else 0)
    chunk = max(1, DEVICE_PROFILES[setup.device].chunk_bytes // (4 * base.vocabulary))
    logits = (LOGIT_BYTES + 4 * base.caps_logits) * base.vocabulary * min(tokens, chunk)
    head = tokens * 10 * h + (0 if base.classifier else logits)
    # Each forward casts the adapter to 16 bits.
    casts = COMPUTE_BYTES * trained(base, setup)
    if setup.checkpointing:
        kept, inside = tokens * base.layers * COMPUTE_BYTES * h, tokens * (layer + gradients)
    else:
        kept, inside = tokens * base.layers * layer, tokens * gradients
    return (kept + casts + inside, 0) if inside >= head else (kept + casts, head)


def _stored(base: Architecture, setup: Setup) -> int:
    """Bytes that one layer keeps of one token for its backward, including the adapter's."""
    adapted = targets(base, setup)
    inputs, outputs = (
        sum(sizes) // base.layers for sizes in zip(*((x.inputs, x.outputs) for x in adapted), strict=True)
    )
    lora = COMPUTE_BYTES * setup.r * len(adapted) // base.layers
    # Dropout keeps the input after dropout and its mask; DoRA keeps the base's output, scaled and unscaled.
    dropout = 4 * inputs if setup.dropout else 0
    dora = 4 * outputs if setup.use_dora else 0
    return base.stored + base.scores * base.heads * setup.row + lora + dropout + dora


def _dequantized(base: Architecture, setup: Setup) -> int:
    """Bytes of dequantized matrices: those that stay dequantized, and the one in use."""
    if setup.quantization is Quantization.NONE:
        return 0
    largest = COMPUTE_BYTES * max(linear.elements for linear in base.linears)
    resident = DEVICE_PROFILES[setup.device].resident_bytes if setup.quantization is Quantization.NF4 else 0
    return min(COMPUTE_BYTES * base.linear, resident + largest)


def _matrix(linear: Linear, quantization: Quantization, element_bytes: int) -> int:
    if quantization is Quantization.NF4:
        blocks = math.ceil(linear.elements / NF4_BLOCK)
        return math.ceil(linear.elements / 2) + blocks + 4 * math.ceil(blocks / NF4_SCALES) + NF4_BOOKS
    if quantization is Quantization.INT8:
        return linear.elements + 4 * linear.outputs
    return element_bytes * linear.elements


def _matches(target: str, linear: Linear) -> bool:
    return f".{linear.path}".endswith(f".{target}")
