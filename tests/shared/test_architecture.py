"""Parameters are counted as transformers and peft count them, on a tiny model of each architecture."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shared.errors import InvalidRequest
from shared.estimation import architecture, memory_model
from shared.schemas.requests import Quantization

LLAMA = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"}
ENCODERS = ("bert", "roberta", "deberta-v2")
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-biased": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", LLAMA | {"head_dim": 16}),
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16}),
    "gemma": ("gemma", LLAMA),
    "gemma2": ("gemma2", LLAMA | {"head_dim": 16}),
    "gemma3": ("gemma3_text", LLAMA),
    "gpt2": ("gpt2", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt2-narrow": ("gpt2", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}),
    "bert": ("bert", BERT),
    "roberta": ("roberta", BERT | {"id2label": {0: "a", 1: "b", 2: "c"}, "type_vocab_size": 1}),
    "deberta": ("deberta-v2", BERT),
    "deberta-v2": ("deberta-v2", BERT | RELATIVE | {"conv_kernel_size": 3, "type_vocab_size": 2}),
    "deberta-v3": (
        "deberta-v2",
        BERT | RELATIVE | {"share_att_key": True, "position_buckets": 16, "position_biased_input": False},
    ),
}
REAL = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    ),
    "SmolLM2-135M": (
        134_515_008,
        {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "GPT-2": (
        124_439_808,
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    ),
    # 124,645,632 of the bare model, whose pooler is as large as the classifier's dense layer, and two labels.
    "RoBERTa-base": (
        124_645_632 + 2 * 769,
        {"model_type": "roberta", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        | {"num_attention_heads": 12, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
}


def built(model_type: str, config: dict[str, Any]) -> PreTrainedModel:
    """The real modules, without memory for their weights."""
    kind = AutoModelForSequenceClassification if model_type in ENCODERS else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(AutoConfig.for_model(model_type, **config))
    return model


def setup_of(**fields: Any) -> memory_model.Setup:
    return memory_model.Setup(**{"quantization": Quantization.NF4, "r": 3, "micro_batch": 1, "max_length": 64} | fields)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_counted(name: str) -> None:
    model_type, config = TINY[name]
    model, base = built(model_type, config), architecture.read_config({"model_type": model_type} | config)
    assert base.total == sum(weight.numel() for weight in model.parameters())
    inside = {linear.path: linear.elements for linear in base.linears}
    outside = ("lm_head", "score", "classifier", "pooler")
    assert inside == {
        path: module.weight.numel()
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and not path.startswith(outside)
    }


@pytest.mark.parametrize("name", TINY)
def test_a_stored_config_says_the_same(name: str) -> None:
    """What save_pretrained writes has every default in it; a config from elsewhere has few."""
    model_type, config = TINY[name]
    stored = architecture.read_config(AutoConfig.for_model(model_type, **config).to_dict())
    assert replace(stored, context=None) == replace(
        architecture.read_config({"model_type": model_type} | config), context=None
    )


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", TINY)
def test_what_is_trained_is_what_peft_trains(name: str, use_dora: bool) -> None:
    model_type, config = TINY[name]
    base = architecture.read_config({"model_type": model_type} | config)
    task = "CAUSAL_LM" if base.causal else "SEQ_CLS"
    last = sorted({linear.path.rpartition(".")[2] for linear in base.linears})[-1]
    if use_dora:
        targets: list[Any] = ["all-linear"]
    else:
        targets = ["all-linear", [last], [base.linears[0].path]]
    for target in targets:
        # DoRA reads the weights when it is made, so these are real.
        model = built(model_type, config).to_empty(device="cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(
                model,
                LoraConfig(
                    task_type=task,
                    r=3,
                    target_modules=target,
                    use_dora=use_dora,
                    fan_in_fan_out=model_type == "gpt2",
                    modules_to_save=["classifier", "pooler"] if model_type == "deberta-v2" else None,
                ),
            )
        setup = setup_of(target_modules=target, use_dora=use_dora)
        assert memory_model.trained(base, setup) == sum(w.numel() for w in adapted.parameters() if w.requires_grad), (
            target
        )


@pytest.mark.parametrize("name", REAL)
def test_published_counts(name: str) -> None:
    total, config = REAL[name]
    assert architecture.read_config(config).total == total


def test_an_unknown_architecture_is_told_what_is_known() -> None:
    with pytest.raises(
        InvalidRequest, match="found model_type 'mamba'; known are bert, deberta-v2, gemma, "
    ) as refused:
        architecture.read_config({"model_type": "mamba"})
    assert (refused.value.code, refused.value.param) == ("unsupported_base_model", "model")
    with pytest.raises(InvalidRequest, match="found model_type None"):
        architecture.read_config({})
    with pytest.raises(InvalidRequest, match=r"config\.json of a llama cannot be read: KeyError"):
        architecture.read_config({"model_type": "llama", "hidden_size": 8})
