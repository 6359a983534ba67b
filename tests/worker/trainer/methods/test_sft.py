"""The chunked loss equals the ordinary loss, and packing and micro-batches do not change the gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from shared.estimation.defaults import CHUNK_BYTES
from shared.schemas.requests import Quantization
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes, recipe_of
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoded, Encoder
from worker.trainer.forward import layout_probe
from worker.trainer.forward.batches import IGNORED, batches, collate, trained_tokens
from worker.trainer.forward.layout import Layout
from worker.trainer.forward.log_likelihood import log_likelihood
from worker.trainer.methods import sft
from worker.trainer.model.base import Base, attach, load_base, trainable


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Base:
    """A base in fp32, so that results can be compared exactly."""
    folder: str = request.getfixturevalue(request.param)
    return load_base(folder, Quantization.NONE, compute_dtype=torch.float32)


@pytest.fixture
def examples(encoder: Encoder, make_task: MakeTask, write_rows: WriteRows) -> list[Encoded]:
    rows = dataset.load(make_task(write_rows(quotes(9))), encoder).train
    return [row for row in rows if isinstance(row, Encoded)]


def layout(*, packing: bool = True, chunked: bool = True, micro_batch: int = 8) -> Layout:
    return Layout(packing=packing, chunked=chunked, micro_batch=micro_batch, pad=2)


def gradients(base: Base, examples: list[Encoded], found: Layout) -> tuple[float, list[torch.Tensor]]:
    parameters = [p for p in base.model.parameters() if p.requires_grad]
    base.model.zero_grad()
    total, tokens = 0.0, trained_tokens(examples)
    for batch in batches(examples, packing=found.packing, micro_batch=found.micro_batch, pad=found.pad):
        loss = sft.loss(base.model, batch, found)
        torch.autograd.backward(loss.sums.sum() / tokens)
        total += loss.sums.sum().item() / tokens
    return total, [p.grad.clone() for p in parameters if p.grad is not None]


def test_loss_and_gradient_do_not_depend_on_the_layout(
    base: Base, examples: list[Encoded], make_task: MakeTask, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of 1, 3 or all examples, packed or padded, with the head in chunks of five tokens or in one."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 5 * 4 * 320)
    adapted = attach(base, recipe_of(make_task(write_rows(quotes(9))))).adapted
    for name, parameter in trainable(adapted).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wanted, wanted_gradients = gradients(base, examples, layout(packing=False, chunked=False, micro_batch=1))
    assert wanted_gradients
    for packing, chunked, micro_batch in itertools.product((True, False), (True, False), (1, 3, 9)):
        found, found_gradients = gradients(
            base, examples, layout(packing=packing, chunked=chunked, micro_batch=micro_batch)
        )
        assert found == pytest.approx(wanted, rel=1e-5)
        for one, other in zip(found_gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6)


def test_loss_and_accuracy_equal_torchs(base: Base, examples: list[Encoded]) -> None:
    batch = collate([[e] for e in examples], packing=False, pad=2)
    base.model.eval()
    with torch.no_grad():
        logits = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        wanted = functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        hits = (logits.argmax(-1) == batch.targets) & (batch.targets != IGNORED)
        found = sft.loss(base.model, batch, layout(packing=False))
    assert found.sums.sum().item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (int(found.hits.sum()), sum(found.counts)) == (int(hits.sum()), trained_tokens(examples))


def test_each_document_keeps_its_own_likelihood(base: Base, examples: list[Encoded]) -> None:
    """Whichever documents share its row, and wherever a chunk of the head ends."""
    wanted = {line: pair for e in examples for line, *pair in by_line(base, [e], layout(packing=False))}
    assert sorted(wanted) == [e.line for e in examples]
    for packing in (True, False):
        for line, nats, hits in by_line(base, examples, layout(packing=packing)):
            assert [nats, hits] == [pytest.approx(wanted[line][0], rel=1e-4), wanted[line][1]]


def by_line(base: Base, examples: list[Encoded], found: Layout) -> list[tuple[int, float, int]]:
    """(line, nats, hits) of each document."""
    base.model.eval()
    with torch.no_grad():
        [batch] = batches(examples, packing=found.packing, micro_batch=99, pad=found.pad)
        each = log_likelihood(base.model, batch, found)
    return list(zip(batch.lines, each.nats.tolist(), each.hits.tolist(), strict=True))


def test_packing_is_exact_on_common_bases(base: Base, examples: list[Encoded]) -> None:
    found, warnings = layout_probe.layout(base, examples, packing=True, micro_batch=1, pad=2)
    assert (found.packing, found.chunked, warnings) == (True, True, [])


SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4)
LFM2 = Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (BLOOM, False),
        (LFM2, False),
        (LlamaConfig(**SMALL), True),
        (GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4), True),
        (Gemma2Config(**SMALL, head_dim=16, sliding_window=8), True),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_even_a_small_leak_is_found(
    examples: list[Encoded], config: PreTrainedConfig, exact: bool, dtype: torch.dtype
) -> None:
    """ALiBi and convolutions ignore that positions restart. With untrained weights the leak is small."""
    torch.manual_seed(0)
    odd = Base(AutoModelForCausalLM.from_config(config, dtype=dtype), torch.device("cpu"), dtype)
    odd.model.config.use_cache = False
    for rows in (examples, examples[:1]):
        assert layout_probe.layout(odd, rows, packing=True, micro_batch=1, pad=2)[0].packing == exact


def test_packing_is_disabled_if_attention_leaks(base: Base, examples: list[Encoded]) -> None:
    """With a cache, transformers builds no block-diagonal mask. That is the usual cause of leaks."""

    def with_cache(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return args, kwargs | {"use_cache": True}

    handle = base.model.get_decoder().register_forward_pre_hook(with_cache, with_kwargs=True)
    found, warnings = layout_probe.layout(base, examples, packing=True, micro_batch=1, pad=2)
    handle.remove()
    assert not found.packing
    assert "padded instead" in warnings[0]


def odd_heads() -> list[PreTrainedModel]:
    """Models that scale or cap their logits."""
    torch.manual_seed(0)
    return [
        Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=1.0)),
        CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    ]


@pytest.mark.parametrize("odd", odd_heads(), ids=lambda m: type(m).__name__)
def test_capped_and_scaled_heads_can_be_chunked(odd: PreTrainedModel, examples: list[Encoded]) -> None:
    base = Base(odd, torch.device("cpu"), torch.float32)
    found, warnings = layout_probe.layout(base, examples, packing=True, micro_batch=1, pad=2)
    assert (found.chunked, warnings) == (True, [])


@pytest.mark.parametrize("odd", odd_heads(), ids=lambda m: type(m).__name__)
def test_chunked_gradients_of_capped_and_scaled_heads_equal_autograds(
    odd: PreTrainedModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 5 * 4 * 320)
    base = Base(odd, torch.device("cpu"), torch.float32)
    odd.get_input_embeddings().requires_grad_(requires_grad=False)
    wanted, wanted_gradients = gradients(base, examples, layout(chunked=False))
    found, found_gradients = gradients(base, examples, layout())
    assert found == pytest.approx(wanted, rel=1e-5)
    assert max(float(one.abs().max()) for one in wanted_gradients) > 1e-4
    for one, other in zip(found_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6)


def test_an_unknown_head_uses_the_models_own_logits(base: Base, examples: list[Encoded]) -> None:
    handle = base.model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits**3))
    found, warnings = layout_probe.layout(base, examples, packing=True, micro_batch=1, pad=2)
    handle.remove()
    assert not found.chunked
    assert "all logits are computed at once" in warnings[0]
