"""What is trained, as named tensors: read from a model and put back into it."""

from __future__ import annotations

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from worker.trainer.model.base import trainable
from worker.trainer.model.full_weights import Adapted, FullWeights

#: The file of a published adapter, and of a checkpoint.
ADAPTER = "adapter_model.safetensors"

Tensors = dict[str, torch.Tensor]


def adapter_tensors(adapted: Adapted) -> Tensors:
    """A copy on the CPU of what is published: the adapter under the keys of the PEFT format, or all weights."""
    if isinstance(adapted, FullWeights):
        return {name: tensor.to("cpu") for name, tensor in adapted.published().items()}
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(state.items())}


def set_adapter(adapted: Adapted, tensors: Tensors) -> None:
    """Raises ValueError unless `tensors` are exactly the adapter's."""
    if isinstance(adapted, FullWeights):
        adapted.set(tensors)
        return
    if (wanted := adapter_tensors(adapted).keys()) != tensors.keys():
        raise ValueError(f"the adapter's tensors differ: {sorted(wanted ^ tensors.keys())[:4]}")
    set_peft_model_state_dict(adapted, tensors)


def exact_tensors(adapted: Adapted) -> Tensors:
    """What training goes on from: fp32, and no copy of it where it lies on the CPU."""
    if not isinstance(adapted, FullWeights):
        return adapter_tensors(adapted)
    return {name: weight.detach().to("cpu") for name, weight in trainable(adapted).items()}
