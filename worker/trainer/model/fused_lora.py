"""A linear layer with a LoRA on it, as one step of autograd.

Owns: the arithmetic of `y = x Wᵀ + s (x Aᵀ) Bᵀ` and of its gradients, and how long a dequantized W lives. Must not
change W. PEFT's own forward is the same mathematics in a dozen kernels, most of which only copy activations.
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

ADAPTER = "default"


def fuse(adapted: PeftModel) -> None:
    """Give every adapter that is a plain LoRA on a plain matrix the faster forward.

    It goes when the adapter is taken off, the dequantized matrices with it. The rest keeps PEFT's: DoRA, dropout,
    LLM.int8(), Conv1D.
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
    """Keep no matrix dequantized any longer: memory is short, and the result the same to the bit."""
    for module in adapted.modules():
        if isinstance(module, LoraLayer) and "forward" in vars(module):
            module.forward = partial(forward, module, None)


def forward(module: Any, resident: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """In place of `module.forward`: (…, in) → (…, out).

    What is scored rather than learned goes PEFT's own way, so that whoever loads the adapter finds the same bits.
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
    """(out, in) in the type that products run in; for a 4-bit matrix the values that bitsandbytes computes with."""
    if isinstance(base, Linear4bit):
        unpacked: torch.Tensor = dequantize_4bit(base.weight.data, base.weight.quant_state)
        return unpacked.to(base.compute_dtype or unpacked.dtype)
    return base.weight


class _LoraLinear(torch.autograd.Function):
    """Keeps x and x Aᵀ for backward, and takes W anew there."""

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
