"""The head that makes a classifier of a base: which modules it is, and what its weights are before training.

Owns: telling the head from the backbone, and drawing what a base's files do not hold of it. A head is in fp32, never
quantized, bears no LoRA, is trained in full and published whole. Must not load a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

#: Between backbone and labels, BERT has a pooler, which masked language models are saved without.
POOLER = "pooler"
#: Of a head whose base names none in its config.
INITIALIZER_RANGE = 0.02


def head(model: PreTrainedModel, missing: Iterable[str]) -> tuple[str, ...]:
    """Paths of the modules that a classifier has beyond its backbone, and of the pooler that the files are without."""
    beyond = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]
    poolers = {name.rpartition(f".{POOLER}.")[0] + f".{POOLER}" for name in missing if f".{POOLER}." in name}
    return (*beyond, *sorted(poolers))


def unquantized(base_dir: str) -> list[str]:
    """What quantization passes over: the head, as regular expressions on paths."""
    config = AutoConfig.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    return [*map(re.escape, head(model, ())), rf".*\b{POOLER}"]


def config(base_dir: str, labels: Sequence[str], *, pad: int) -> PreTrainedConfig:
    """The base's config as a classifier's: which label each output is, and what rows are padded with.

    It is published beside the adapter, whose own config knows neither.
    """
    found = AutoConfig.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)
    found.id2label = dict(enumerate(labels))
    found.label2id = {label: i for i, label in enumerate(labels)}
    found.get_text_config().pad_token_id = pad
    found.architectures = [AutoModelForSequenceClassification._model_mapping[type(found)].__name__]
    return found


def means_other(config: PreTrainedConfig, labels: Sequence[str]) -> bool:
    """Do the base's files name the outputs of their head, and other than `labels`, or in another order?

    Such an output would begin as the answer to another question.
    """
    named = [config.id2label.get(i) for i in range(len(labels))]
    return named != [f"LABEL_{i}" for i in range(len(labels))] and named != list(labels)


def is_of(name: str, head: Iterable[str]) -> bool:
    """Is this parameter the head's?"""
    return any(name.startswith(f"{module}.") for module in head)


def draw(model: PreTrainedModel, names: Iterable[str], *, seed: int, pad: int) -> None:
    """Give the parameters `names` the first weights that `seed` draws: matrices normal, norms one, biases zero.

    The same in training and in the proof, and in every job on a resident base. `pad` is what rows will be padded with:
    a decoder answers at the last token that is none.
    """
    model.config.get_text_config().pad_token_id = pad
    deviation = float(getattr(model.config.get_text_config(), "initializer_range", None) or INITIALIZER_RANGE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(names):
            parameter = model.get_parameter(name)
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
