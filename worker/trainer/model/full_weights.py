"""Full fine-tuning: fp32 copies of all weights take the places of the base's own, which are kept.

Owns: which of the two sets the model currently uses. The class has the methods of a PeftModel that the trainer uses, so
that "adapter disabled" means the base here too. Must not change a weight of the base: the next job may use it.

Trained weights are fp32, because an update is often smaller than the precision of bf16; autocast runs the products in
the compute type. For evaluation the weights are rounded to the type of the published files, then to the type in which
the base is loaded. So a score holds for whoever loads the files, and base and tuned model use the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch.nn import Parameter
from transformers import PreTrainedModel

Tensors = Mapping[str, torch.Tensor]


class FullWeights:
    """A base and its trained weights. Tied weights are a single parameter, under the first of their names.

    Switching replaces Parameter objects in the modules and copies no data into the base's own, so autograd and autocast
    never confuse the two. `stored` is the type of the base's files.
    """

    def __init__(self, model: PreTrainedModel, *, stored: torch.dtype) -> None:
        self.originals: dict[str, Parameter] = dict(model.named_parameters())
        self.weights = {
            name: Parameter(original.detach().to(torch.float32, copy=True)) for name, original in self.originals.items()
        }
        self._model, self._stored = model, stored
        names = {original: name for name, original in self.originals.items()}
        self._places = [
            (module, attribute, names[parameter])
            for module in model.modules()
            for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        self._in_use: Tensors = self.originals
        self.train()

    @property
    def training(self) -> bool:
        return bool(self._model.training)

    def get_base_model(self) -> PreTrainedModel:
        """The model, with the weights that are in use at the moment."""
        return self._model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, total): the same number twice."""
        count = sum(weight.numel() for weight in self.weights.values())
        return count, count

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The trained weights, in the model's order."""
        return iter(self.weights.items())

    def parameters(self) -> Iterator[Parameter]:
        """All parameters in memory: the trained ones, then the base's own, frozen."""
        yield from self.weights.values()
        yield from self.originals.values()

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self._model.buffers()

    def modules(self) -> Iterator[torch.nn.Module]:
        yield from self._model.modules()

    def train(self) -> None:
        self._model.train()
        self._use(self.weights)

    def eval(self) -> None:
        self._use({n: w.to(self.originals[n].dtype) for n, w in self.published().items()})
        self._model.eval()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Use the base's own weights; in train mode as fp32, so that DPO's reference differs by training alone."""
        before = self._in_use
        self._use({n: w.float() for n, w in self.originals.items()} if self.training else self.originals)
        try:
            yield
        finally:
            self._use(before)

    def unload(self) -> PreTrainedModel:
        """Restore the base's own weights for good and return the base."""
        self._use(self.originals)
        return self._model

    def published(self) -> dict[str, torch.Tensor]:
        """Copy the trained weights in the type of the base's files."""
        return {name: weight.detach().to(self._stored, copy=True) for name, weight in self.weights.items()}

    @contextmanager
    def as_published(self) -> Iterator[PreTrainedModel]:
        """Yield the model with the trained weights in the type of the base's files."""
        before = self._in_use
        self._use(self.published())
        try:
            yield self._model
        finally:
            self._use(before)

    @torch.no_grad()
    def set(self, tensors: Tensors) -> None:
        """Overwrite the trained weights. Raises ValueError unless `tensors` has exactly their names."""
        if differing := sorted(self.weights.keys() ^ tensors.keys()):
            raise ValueError(f"tensor names differ from this model's: {differing[:4]}")
        for name, weight in self.weights.items():
            weight.copy_(tensors[name])

    def _use(self, tensors: Tensors) -> None:
        parameters = {n: t if isinstance(t, Parameter) else Parameter(t, False) for n, t in tensors.items()}
        for module, attribute, name in self._places:
            setattr(module, attribute, parameters[name])
        self._in_use = parameters


#: A base with trainable weights attached: a LoRA, or all of its weights. `disable_adapter` gives the base alone.
Adapted = PeftModel | FullWeights
