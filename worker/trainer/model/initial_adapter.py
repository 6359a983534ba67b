"""The adapter of another job, where training goes on from it: what the run begins as, and what it is measured against.

Owns: reading it, and wearing it for a moment in place of what has been trained since. It costs its own bytes and no
second set of modules: parameters point to other memory and back, so that a reference is the same model, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from worker.trainer.model import adapter_weights

#: By the names of the model's parameters, and where those are.
InitialAdapter = dict[str, torch.Tensor]


def load(folder: str, adapted: PeftModel) -> InitialAdapter:
    """The adapter in this folder, fitted to `adapted`, which is left as it was.

    Raises ValueError unless the two have the same tensors.
    """
    own = adapter_weights.adapter_tensors(adapted)
    adapter_weights.set_adapter(adapted, load_file(Path(folder) / adapter_weights.ADAPTER))
    found = {name: parameter.detach().clone() for name, parameter in _parameters(adapted).items()}
    adapter_weights.set_adapter(adapted, own)
    return found


def apply(adapted: PeftModel, start: InitialAdapter) -> None:
    """Let the adapter be a copy of it."""
    with torch.no_grad():
        for name, parameter in _parameters(adapted).items():
            parameter.copy_(start[name])


@contextmanager
def applied(adapted: PeftModel, start: InitialAdapter) -> Iterator[None]:
    """The model with `start` for its adapter, also where that is off just now, and without the adapter's dropout.

    For what needs no gradient. In train mode the rest stays so: LLM.int8() computes otherwise in evaluation.
    """
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    was_off = layers[0].disable_adapters
    own = {name: parameter.data for name, parameter in _parameters(adapted).items()}
    _point(adapted, start)
    for layer in layers:
        layer.lora_dropout.eval()
    if was_off:
        adapted.base_model.enable_adapter_layers()
    try:
        yield
    finally:
        if was_off:
            adapted.base_model.disable_adapter_layers()
        for layer in layers:
            layer.lora_dropout.train(layer.training)
        _point(adapted, own)


def _parameters(adapted: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's, whether they are being trained or only read."""
    return {name: parameter for name, parameter in adapted.named_parameters() if ".lora_" in name}


def _point(adapted: PeftModel, tensors: InitialAdapter) -> None:
    """Autocast keeps casts by parameter, and would go on with those of the other memory."""
    torch.clear_autocast_cache()
    for name, parameter in _parameters(adapted).items():
        parameter.data = tensors[name]
