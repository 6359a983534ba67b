"""Parameter counts equal those of transformers and peft, on a tiny model of each architecture."""

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
from tests.shared.architectures import ENCODERS, REAL, TINY, setup_of


def built(model_type: str, config: dict[str, Any]) -> PreTrainedModel:
    """The real modules, with weights on the meta device, which take no memory."""
    kind = AutoModelForSequenceClassification if model_type in ENCODERS else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(AutoConfig.for_model(model_type, **config))
    return model


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
def test_a_saved_config_gives_the_same_architecture(name: str) -> None:
    """A config that save_pretrained writes names every default; a config from elsewhere may name few."""
    model_type, config = TINY[name]
    stored = architecture.read_config(AutoConfig.for_model(model_type, **config).to_dict())
    assert replace(stored, context=None) == replace(
        architecture.read_config({"model_type": model_type} | config), context=None
    )


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", TINY)
def test_trained_counts_the_parameters_that_peft_trains(name: str, use_dora: bool) -> None:
    model_type, config = TINY[name]
    base = architecture.read_config({"model_type": model_type} | config)
    task = "CAUSAL_LM" if base.causal else "SEQ_CLS"
    last = sorted({linear.path.rpartition(".")[2] for linear in base.linears})[-1]
    if use_dora:
        targets: list[Any] = ["all-linear"]
    else:
        targets = ["all-linear", [last], [base.linears[0].path]]
    for target in targets:
        # DoRA reads the weights when it is created, so they cannot be on the meta device.
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
def test_totals_equal_published_counts(name: str) -> None:
    total, config = REAL[name]
    assert architecture.read_config(config).total == total


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        InvalidRequest, match="found model_type 'mamba'; known are bert, deberta-v2, gemma, "
    ) as refused:
        architecture.read_config({"model_type": "mamba"})
    assert (refused.value.code, refused.value.param) == ("unsupported_base_model", "model")
    with pytest.raises(InvalidRequest, match="found model_type None"):
        architecture.read_config({})
    with pytest.raises(InvalidRequest, match=r"config\.json of a llama cannot be read: KeyError"):
        architecture.read_config({"model_type": "llama", "hidden_size": 8})


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"model_type": "llama", "max_position_embeddings": 99}, 99),
        ({"model_type": "llama"}, None),
        ({"model_type": "gpt2", "n_positions": 99}, 99),
        ({"model_type": "gpt2"}, 1024),
        ({"model_type": "bert"}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 256, "pad_token_id": 0}, 255),
        ({"model_type": "esm", "max_position_embeddings": 1026, "pad_token_id": None}, 1025),
    ],
)
def test_context_length_leaves_out_positions_before_the_first_token(
    config: dict[str, Any], context: int | None
) -> None:
    assert architecture.context_length(config) == context
