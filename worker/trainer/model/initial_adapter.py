"""The adapter of another job from which training starts: the run begins with it and is compared with it.

Owns: loading it, and applying it for a moment in place of the adapter in training. For that, the same parameters point
to other memory and back. So it costs its own bytes but no second set of modules, and a reference model is the same
model, bit for bit.
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

#: Tensors by the names of the model's adapter parameters, on the same devices as these.
InitialAdapter = dict[str, torch.Tensor]


def load(folder: str, adapted: PeftModel) -> InitialAdapter:
    """Read the adapter in `folder` in the form of `adapted`'s parameters, leaving `adapted` unchanged.

    Raises ValueError unless both have tensors of the same names.
    """
    own = adapter_weights.adapter_tensors(adapted)
    adapter_weights.set_adapter(adapted, load_file(Path(folder) / adapter_weights.ADAPTER))
    found = {name: parameter.detach().clone() for name, parameter in _parameters(adapted).items()}
    adapter_weights.set_adapter(adapted, own)
    return found


def apply(adapted: PeftModel, start: InitialAdapter) -> None:
    """Copy `start` into the adapter's parameters."""
    with torch.no_grad():
        for name, parameter in _parameters(adapted).items():
            parameter.copy_(start[name])


@contextmanager
def applied(adapted: PeftModel, start: InitialAdapter) -> Iterator[None]:
    """Use `start` as the model's adapter inside the block, enabled and without adapter dropout; no gradients.

    The rest of the model keeps its mode, because LLM.int8() computes differently in train and eval mode.
    """
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    was_disabled = layers[0].disable_adapters
    own = {name: parameter.data for name, parameter in _parameters(adapted).items()}
    _point(adapted, start)
    for layer in layers:
        layer.lora_dropout.eval()
    if was_disabled:
        adapted.base_model.enable_adapter_layers()
    try:
        yield
    finally:
        if was_disabled:
            adapted.base_model.disable_adapter_layers()
        for layer in layers:
            layer.lora_dropout.train(layer.training)
        _point(adapted, own)


def _parameters(adapted: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters, trainable or not."""
    return {name: parameter for name, parameter in adapted.named_parameters() if ".lora_" in name}


def _point(adapted: PeftModel, tensors: InitialAdapter) -> None:
    """Let the adapter's parameters point to `tensors`."""
    torch.clear_autocast_cache()  # it holds casts by parameter, here of the memory they pointed to before
    for name, parameter in _parameters(adapted).items():
        parameter.data = tensors[name]
