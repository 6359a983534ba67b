"""Faster attention over short rows on a CPU. CPU only: a GPU uses torch's fused kernel, so you can skip this file.

Owns: the one case in which torch's fused kernel is slow on a CPU. Must not change which tokens attend to which:
transformers builds the mask.

The fused kernel processes a row in blocks of 32 queries, and products of that size are too small for a CPU's bf16
units. Here, rows of up to LONGEST tokens, such as packing makes, are one product each. Backward recomputes the
attention weights, as the fused kernel does, so that none are stored. Scores are rounded to the compute type, as in
transformers' "eager" attention.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "short_rows"
#: Longest row in tokens. Thread time, forward and backward: a quarter of the fused kernel's at 128 tokens, more than
#: the fused kernel's at 512.
LONGEST = 320
#: Names of projections that compute keys, alone or together with queries and values.
KEYS = frozenset({"k_proj", "key", "c_attn", "qkv_proj", "query_key_value"})


def use(model: PreTrainedModel) -> None:
    """Register this attention for a model on a CPU that would use torch's fused kernel.

    Models with biases in their keys, such as Qwen 2, are left alone: their scores can be so large that rounding them to
    bf16 changes the result.
    """
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa" and not _are_keys_biased(model):
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _are_keys_biased(model: PreTrainedModel) -> bool:
    modules = model.named_modules()
    return any(
        name.rpartition(".")[2] in KEYS and getattr(module, "bias", None) is not None for name, module in modules
    )


def attend(  # noqa: PLR0917 (transformers' signature)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend: query (rows, heads, length, width), key and value (rows, groups, length, width) → (rows, length, heads,
    width).

    `attention_mask` (rows, 1, length, length) is True where a query attends to a key; None means causal. Cases that
    this function does not cover go to torch's fused kernel.
    """
    if torch.is_autocast_enabled(query.device.type):
        # The fused kernel casts too: rotary embeddings leave queries and keys in fp32 while values are in bf16.
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    length = query.shape[2]
    if attention_mask is None and _is_causal(module, options):
        attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    short = 1 < length <= LONGEST and length == key.shape[2]
    plain = dropout == 0.0 and not any(options.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    if not (short and plain and alike and attention_mask is not None and attention_mask.dtype == torch.bool):
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    attended: torch.Tensor = _Attention.apply(  # type: ignore[no-untyped-call]  # torch's
        query, key, value, ~attention_mask, scaling
    )
    return attended.transpose(1, 2).contiguous(), None


def _is_causal(module: torch.nn.Module, options: dict[str, Any]) -> bool:
    asked = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


class _Attention(torch.autograd.Function):
    """Queries that share a key head form one matrix, so that keys and values need not be repeated."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes no keywords)
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        rows, heads, length, width = query.shape
        groups = key.shape[1]
        q = query.reshape(rows * groups, heads // groups * length, width)
        k, v = (tensor.reshape(rows * groups, length, width) for tensor in (key, value))
        ctx.save_for_backward(q, k, v, hidden)
        ctx.shape, ctx.scaling = query.shape, scaling
        return torch.bmm(_weights(q, k, hidden, scaling), v).view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, hidden = ctx.saved_tensors
        rows, _, length, width = ctx.shape
        out = gradient.reshape(q.shape)
        weights = _weights(q, k, hidden, ctx.scaling)
        grad_v = torch.bmm(weights.transpose(1, 2), out)
        grad_weights = torch.bmm(out, v.transpose(1, 2))
        scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
        grad_q = torch.bmm(scores, k).view(ctx.shape)
        grad_k = torch.bmm(scores.transpose(1, 2), q)
        return grad_q, grad_k.view(rows, -1, length, width), grad_v.view(rows, -1, length, width), None, None


def _weights(q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax over the keys that are not `hidden`. A query without any gets equal weights; its output is not used."""
    scores = torch.bmm(q * scaling, k.transpose(1, 2))
    rows, length = hidden.shape[0], k.shape[1]
    by_row = scores.view(rows if rows > 1 else 1, -1, length, length)
    by_row.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1)
