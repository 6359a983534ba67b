"""Attention over short rows on a CPU, as a few products of matrices.

Owns: the one case in which torch's fused kernel is slow. Must not change what is attended to: transformers masks.

The fused kernel takes a row in blocks of 32 queries, whose products are too small for a CPU's bf16 units. Rows of
`LONGEST` tokens and fewer, which packing makes, are done whole. Backward computes the weights again, as that kernel
does, so that none are kept. Scores are rounded to the compute type, as in transformers' "eager" attention.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "short_rows"
#: Tokens of a row. In thread time, forward and backward: at 128 a quarter of the fused kernel's, at 512 more than it.
LONGEST = 320
#: What projections that make keys, alone or with queries and values, are called.
KEYS = frozenset({"k_proj", "key", "c_attn", "qkv_proj", "query_key_value"})


def use(model: PreTrainedModel) -> None:
    """Where the model would take torch's fused kernel on a CPU, take this one for short rows.

    Not on bases with biases in their keys, such as Qwen 2: they may make scores so large that rounding shows.
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
    """query (rows, heads, length, width), key and value (rows, groups, length, width) → (rows, length, heads, width).

    `attention_mask` is True where a query sees a key, (rows, 1, length, length), or None: each sees those before it.
    """
    if torch.is_autocast_enabled(query.device.type):
        # As the fused kernel does: rotated in fp32, queries and keys may have another type than values.
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
    """The queries that share a key head are one matrix: nothing is repeated for them."""

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
    """Softmax over the keys that are not `hidden`. A query that sees none gets the mean, which nobody looks at."""
    scores = torch.bmm(q * scaling, k.transpose(1, 2))
    rows, length = hidden.shape[0], k.shape[1]
    by_row = scores.view(rows if rows > 1 else 1, -1, length, length)
    by_row.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1)
