"""The base trained whole: fp32 weights in the places of its own, which are kept.

Owns: which of the two the model holds at a time. It answers to what the rest of the trainer asks of an adapter, so that
"off" is the base, as ever. Must not change a weight of the base: it may serve the next job.

The trained weights are in fp32, because a step is often smaller than what bf16 can tell apart; products run in the
compute type, by autocast. In evaluation they are rounded to the type of the published files, and then to that in which
the base is held: a score is of what a reader of those files gets, and of base and tuned in the same arithmetic.
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
    """A base, and the weights that are trained in its stead. Tied ones are one, under the first of their names.

    Parameters change places, and no data: nothing is written to the base's own, and autograd and autocast know them
    apart. `stored` is the type of the base's files.
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
        self._held: Tensors = self.originals
        self.train()

    @property
    def training(self) -> bool:
        return bool(self._model.training)

    def get_base_model(self) -> PreTrainedModel:
        """The model, holding what it does at the moment."""
        return self._model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, in all), which is the same."""
        count = sum(weight.numel() for weight in self.weights.values())
        return count, count

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """What is trained, in the model's order."""
        return iter(self.weights.items())

    def parameters(self) -> Iterator[Parameter]:
        """All that are held: what is trained, and the base's own, frozen."""
        yield from self.weights.values()
        yield from self.originals.values()

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self._model.buffers()

    def modules(self) -> Iterator[torch.nn.Module]:
        yield from self._model.modules()

    def train(self) -> None:
        self._model.train()
        self._hold(self.weights)

    def eval(self) -> None:
        self._hold({n: w.to(self.originals[n].dtype) for n, w in self.published().items()})
        self._model.eval()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base as it was; in train mode in fp32, so that what DPO compares differs by what was learned alone."""
        held = self._held
        self._hold({n: w.float() for n, w in self.originals.items()} if self.training else self.originals)
        try:
            yield
        finally:
            self._hold(held)

    def unload(self) -> PreTrainedModel:
        """The base, its own weights back in their places for good."""
        self._hold(self.originals)
        return self._model

    def published(self) -> dict[str, torch.Tensor]:
        """A copy of what is trained, in the type of the base's files."""
        return {name: weight.detach().to(self._stored, copy=True) for name, weight in self.weights.items()}

    @contextmanager
    def as_published(self) -> Iterator[PreTrainedModel]:
        """The model with what is trained, in the type of the base's files."""
        held = self._held
        self._hold(self.published())
        try:
            yield self._model
        finally:
            self._hold(held)

    @torch.no_grad()
    def set(self, tensors: Tensors) -> None:
        """Take these for what is trained. Raises ValueError unless they are exactly its names."""
        if differing := sorted(self.weights.keys() ^ tensors.keys()):
            raise ValueError(f"the weights differ: {differing[:4]}")
        for name, weight in self.weights.items():
            weight.copy_(tensors[name])

    def _hold(self, tensors: Tensors) -> None:
        parameters = {n: t if isinstance(t, Parameter) else Parameter(t, False) for n, t in tensors.items()}
        for module, attribute, name in self._places:
            setattr(module, attribute, parameters[name])
        self._held = parameters


#: A base with what is trained of it: a LoRA, or all of its weights. Off, it is the base.
Adapted = PeftModel | FullWeights
