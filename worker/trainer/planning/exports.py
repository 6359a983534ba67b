"""Which exports a job may ask for: what cannot be made is refused before it trains, and not hours later.

Owns: the reasons. Must not load a model.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import AutoConfig

from shared.errors import TrainingFailed
from shared.schemas.requests import ExportName, Quantization
from worker.trainer.data.encoding import Encoder
from worker.trainer.llama_cpp import forms, vocabulary
from worker.trainer.protocol import Task


def check(task: Task, encoder: Encoder) -> None:
    """Raises TrainingFailed for the first export that this base, or this adapter, cannot be given."""
    if task.trainer.exports and task.method.type == "classification":
        raise _none_of("a classifier has no exports: its head is trained beside the LoRA, and stays with it")
    if task.trainer.exports and task.trainer.full_finetuning:
        raise _none_of("a model that was trained whole has no exports: what is published is merged already")
    for name in task.trainer.exports:
        if (refused := _REFUSALS[name](task, encoder)) is not None:
            reason, hint = refused
            raise TrainingFailed(
                f"the export {name.value!r} cannot be made: {reason}",
                code="invalid_exports",
                param="trainer.exports",
                hint=hint,
            )


def _none_of(message: str) -> TrainingFailed:
    return TrainingFailed(
        message,
        code="invalid_exports",
        param="trainer.exports",
        hint="leave it out; the published folder is used as it is",
    )


Refusal = tuple[str, str] | None


def _merged(task: Task, encoder: Encoder) -> Refusal:
    return None


def _merged_dequantized(task: Task, encoder: Encoder) -> Refusal:
    if task.quantization is Quantization.NONE:
        return "the base is not quantized (quantization is none)", "ask for merged, which is the same here"
    return None


def _gguf_adapter(task: Task, encoder: Encoder) -> Refusal:
    if task.lora.use_dora:
        return "llama.cpp knows no DoRA", "ask for gguf_merged, or leave lora.use_dora out"
    return _gguf(task)


def _gguf_merged(task: Task, encoder: Encoder) -> Refusal:
    if (refused := _gguf(task)) is not None:
        return refused
    try:
        vocabulary.of(encoder.tokenizer, AutoConfig.from_pretrained(task.base_dir, local_files_only=True).vocab_size)
    except vocabulary.Unsupported as found:
        return f"this base has {found}", "ask for merged, and convert it with llama.cpp's own script"
    return None


def _gguf(task: Task) -> Refusal:
    found = forms.refusal(AutoConfig.from_pretrained(task.base_dir, local_files_only=True))
    if found is None:
        return None
    return f"this base has {found}", "ask for merged, and convert it with llama.cpp's own script"


_REFUSALS: dict[ExportName, Callable[[Task, Encoder], Refusal]] = {
    ExportName.MERGED: _merged,
    ExportName.MERGED_DEQUANTIZED: _merged_dequantized,
    ExportName.GGUF_ADAPTER: _gguf_adapter,
    ExportName.GGUF_MERGED: _gguf_merged,
}
