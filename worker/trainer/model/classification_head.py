"""The classification head of a base: which modules form it, and its initial weights.

Owns: telling head from backbone, and initializing head parameters that the base's files lack. A head is fp32, never
quantized, has no LoRA, is trained in full and is published with the adapter. Must not load weights from files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

#: BERT has a pooler between backbone and classifier. Masked language models are saved without it.
POOLER = "pooler"
#: Standard deviation of initial weights, if the base's config names none.
INITIALIZER_RANGE = 0.02


def head(model: PreTrainedModel, missing: Iterable[str]) -> tuple[str, ...]:
    """Paths of the head modules: all outside the backbone, and the pooler if its parameters are in `missing`."""
    beyond = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]
    poolers = {name.rpartition(f".{POOLER}.")[0] + f".{POOLER}" for name in missing if f".{POOLER}." in name}
    return (*beyond, *sorted(poolers))


def unquantized(base_dir: str) -> list[str]:
    """Regular expressions for the paths of the head modules, which are not quantized."""
    config = AutoConfig.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    return [*map(re.escape, head(model, ())), rf".*\b{POOLER}"]


def config(base_dir: str, labels: Sequence[str], *, pad: int) -> PreTrainedConfig:
    """The base's config as that of a classifier, with the label of each output and the pad id.

    It is published with the adapter, because PEFT's adapter config has no field for either.
    """
    found = AutoConfig.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)
    found.id2label = dict(enumerate(labels))
    found.label2id = {label: i for i, label in enumerate(labels)}
    found.get_text_config().pad_token_id = pad
    found.architectures = [AutoModelForSequenceClassification._model_mapping[type(found)].__name__]
    return found


def labels_differ(config: PreTrainedConfig, labels: Sequence[str]) -> bool:
    """Whether the base's files name labels for their head that differ from `labels`, also in order.

    Such a head was trained for other labels, so its output weights are not kept.
    """
    named = [config.id2label.get(i) for i in range(len(labels))]
    return named != [f"LABEL_{i}" for i in range(len(labels))] and named != list(labels)


def in_head(name: str, head: Iterable[str]) -> bool:
    """Whether the parameter `name` belongs to one of the modules `head`."""
    return any(name.startswith(f"{module}.") for module in head)


def initialize(model: PreTrainedModel, names: Iterable[str], *, seed: int, pad: int) -> None:
    """Set the parameters `names` to initial values from `seed`: matrices normal, norms one, biases zero.

    A generator of its own makes them the same in training, in the proof, and in every job on this base. `pad` is the
    pad id: a decoder classifies at the last token that is not padding.
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
