"""Attention over short rows gives the results and gradients of torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from worker.trainer.model import short_attention

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def heads(groups: int, length: int, dtype: torch.dtype) -> Tensors:
    torch.manual_seed(0)
    shapes = [(2, 6, length, 16), (2, groups, length, 16), (2, groups, length, 16)]
    query, key, value = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return query, key, value


def documents(length: int) -> torch.Tensor:
    """A causal mask (2, 1, length, length) in which each third of a row is a document of its own."""
    position = torch.arange(length)
    third = 3 * position // length
    return ((position[:, None] >= position) & (third[:, None] == third)).expand(2, 1, length, length)


@pytest.mark.parametrize("masked", [True, False], ids=["documents", "causal"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_equals_torchs_attention_and_gradients(groups: int, masked: bool, dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = heads(groups, 30, dtype)
    mask = documents(30) if masked else None
    ours, _ = short_attention.attend(torch.nn.Module(), query, key, value, mask, scaling=0.2)
    theirs = functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=mask, is_causal=not masked, scale=0.2, enable_gqa=True
    ).transpose(1, 2)
    above = torch.randn_like(theirs)
    mine = torch.autograd.grad(ours, (query, key, value), above.to(dtype))
    wanted = torch.autograd.grad(theirs, (query, key, value), above)
    for one, other in zip([ours, *mine], [theirs, *wanted], strict=True):
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm()


def test_inputs_are_cast_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp32 weights, rotary embeddings leave queries and keys in fp32, while values are in bf16."""
    monkeypatch.delattr(short_attention, "sdpa_attention_forward")
    query, key, value = heads(2, 30, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = short_attention.attend(torch.nn.Module(), query, key, value.bfloat16(), documents(30), scaling=0.2)
    q, k, v = (tensor.bfloat16() for tensor in (query, key, value))
    assert torch.equal(mixed, short_attention.attend(torch.nn.Module(), q, k, v, documents(30), scaling=0.2)[0])
    gradients = torch.autograd.grad(mixed.float().sum(), (query, key, value))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_long_rows_use_torchs_kernel() -> None:
    query, key, value = heads(6, short_attention.LONGEST + 1, torch.float32)
    ours, _ = short_attention.attend(torch.nn.Module(), query, key, value, None, scaling=0.25)
    theirs = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25)
    assert torch.equal(ours, theirs.transpose(1, 2))


def test_models_with_sdpa_attention_use_it() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    ids = torch.arange(20).view(2, 10)
    before = model(input_ids=ids, use_cache=False).logits
    short_attention.use(model)
    assert model.config._attn_implementation == short_attention.NAME
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before)
    # Generation uses a cache, so that there are more keys than queries.
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 13)


def test_keys_with_biases_use_torchs_kernel() -> None:
    """Their scores may be too large for the precision of bf16."""
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=4))
    for model in (qwen2, gpt2):
        short_attention.use(model)
        assert model.config._attn_implementation == "sdpa"


def test_eager_models_stay_eager() -> None:
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    short_attention.use(model)
    assert model.config._attn_implementation == "eager"
