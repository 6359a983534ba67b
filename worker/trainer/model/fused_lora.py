"""A faster LoRA forward and backward for CPUs. CPU only: on a GPU PEFT's own forward runs, so you can skip this file.

Owns: `y = x Wᵀ + s (x Aᵀ) Bᵀ` and its gradients as a single autograd function, and how long a dequantized W is kept.
Must not change W. PEFT's own forward computes the same with a dozen kernels, most of which only copy activations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from shared.estimation.defaults import RESIDENT_BYTES
from worker.trainer.model.full_weights import Adapted

#: PEFT's name for an adapter that was given none.
ADAPTER = "default"


def fuse(adapted: PeftModel) -> None:
    """Replace the forward of every plain LoRA layer until the adapter is detached.

    The first layers also keep their matrix dequantized, up to RESIDENT_BYTES in total. Layers with DoRA, dropout,
    LLM.int8() or Conv1D keep PEFT's forward.
    """
    room = RESIDENT_BYTES
    for module in adapted.modules():
        if isinstance(module, LoraLayer) and _is_plain(module):
            resident = None
            if isinstance(module.base_layer, Linear4bit):
                need = module.in_features * module.out_features * module.base_layer.weight.quant_state.dtype.itemsize
                if need <= room:
                    resident, room = weight(module.base_layer), room - need
            module.forward = partial(forward, module, resident)


def drop_resident_weights(adapted: Adapted) -> None:
    """Free the dequantized matrices, for when memory is short. Results stay the same, bit for bit."""
    for module in adapted.modules():
        if isinstance(module, LoraLayer) and "forward" in vars(module):
            module.forward = partial(forward, module, None)


def forward(module: Any, resident: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Replacement of `module.forward`: (…, in) → (…, out).

    In evaluation PEFT's own forward runs, so that whoever loads the adapter with PEFT gets the same bits.
    """
    if module.disable_adapters or module.merged or not module.training:
        plain: torch.Tensor = type(module).forward(module, x)
        return plain
    base = module.base_layer
    y: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch's
        x, module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, base, resident, module.scaling[ADAPTER]
    )
    return y


def weight(base: torch.nn.Linear) -> torch.Tensor:
    """W (out, in) in the compute type. A 4-bit matrix is dequantized to the values that bitsandbytes computes with."""
    if isinstance(base, Linear4bit):
        unpacked: torch.Tensor = dequantize_4bit(base.weight.data, base.weight.quant_state)
        return unpacked.to(base.compute_dtype or unpacked.dtype)
    return base.weight


class _LoraLinear(torch.autograd.Function):
    """Saves x and x Aᵀ for backward; W is dequantized again there unless it is resident."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes no keywords)
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        base: torch.nn.Linear,
        resident: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        w = weight(base) if resident is None else resident
        rows = x.reshape(-1, x.shape[-1]).to(w.dtype)
        bias = None if base.bias is None else base.bias.to(w.dtype)
        narrow = rows @ a.to(w.dtype).T
        y = functional.linear(rows, w, bias).addmm_(narrow, b.to(w.dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, narrow, a, b)
        ctx.base, ctx.resident, ctx.scaling, ctx.dtype = base, resident, scaling, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, narrow, a, b = ctx.saved_tensors
        out = gradient.reshape(-1, gradient.shape[-1]).to(rows.dtype)
        back = out @ b.to(rows.dtype) * ctx.scaling
        grad_a, grad_b = back.T @ rows, (out.T @ narrow) * ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            w = weight(ctx.base) if ctx.resident is None else ctx.resident
            grad_x = (out @ w).addmm_(back, a.to(rows.dtype)).view(*gradient.shape[:-1], -1).to(ctx.dtype)
        return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None, None


def _is_plain(module: Any) -> bool:
    base = module.base_layer
    return (
        type(base) in (torch.nn.Linear, Linear4bit)
        and list(module.lora_A) == [ADAPTER]
        and not module.lora_variant
        and not module.lora_bias[ADAPTER]
        and isinstance(module.lora_dropout[ADAPTER], torch.nn.Identity)
    )
