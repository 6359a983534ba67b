"""Read the trained weights from a model as named tensors, and load them back."""

from __future__ import annotations

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from worker.trainer.model.base import trainable
from worker.trainer.model.full_weights import Adapted, FullWeights

#: File name of the trained weights, in a published adapter and in a checkpoint.
ADAPTER = "adapter_model.safetensors"

Tensors = dict[str, torch.Tensor]


def adapter_tensors(adapted: Adapted) -> Tensors:
    """Copy the weights to publish to the CPU: the adapter under PEFT's keys, or all weights of a full fine-tuning."""
    if isinstance(adapted, FullWeights):
        return {name: tensor.to("cpu") for name, tensor in adapted.published().items()}
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(state.items())}


def set_adapter(adapted: Adapted, tensors: Tensors) -> None:
    """Load trained weights into the model. Raises ValueError if the names differ from the model's own."""
    if isinstance(adapted, FullWeights):
        adapted.set(tensors)
        return
    if (wanted := adapter_tensors(adapted).keys()) != tensors.keys():
        raise ValueError(f"tensor names differ from this adapter's: {sorted(wanted ^ tensors.keys())[:4]}")
    set_peft_model_state_dict(adapted, tensors)


def exact_tensors(adapted: Adapted) -> Tensors:
    """The fp32 weights that a resumed run needs, on the CPU. Full weights already on the CPU are not copied."""
    if not isinstance(adapted, FullWeights):
        return adapter_tensors(adapted)
    return {name: weight.detach().to("cpu") for name, weight in trainable(adapted).items()}
