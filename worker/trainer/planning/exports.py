"""Refuse exports that cannot be made, before the job trains.

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
    """Check the exports that a job asks for. Raises TrainingFailed: the first one that cannot be made."""
    if task.trainer.exports and task.method.type == "classification":
        raise _no_exports("a classifier has no exports: its head is trained with the LoRA and published with it")
    if task.trainer.exports and task.trainer.full_finetuning:
        raise _no_exports("full fine-tuning has no exports: the published model is merged already")
    for name in task.trainer.exports:
        if (found := _REFUSALS[name](task, encoder)) is not None:
            reason, hint = found
            raise TrainingFailed(
                f"the export {name.value!r} cannot be made: {reason}",
                code="invalid_exports",
                param="trainer.exports",
                hint=hint,
            )


def _no_exports(message: str) -> TrainingFailed:
    return TrainingFailed(
        message,
        code="invalid_exports",
        param="trainer.exports",
        hint="leave trainer.exports out and use the published folder",
    )


#: Why an export cannot be made, and a hint; None if it can.
Refusal = tuple[str, str] | None


def _merged(task: Task, encoder: Encoder) -> Refusal:
    return None


def _merged_dequantized(task: Task, encoder: Encoder) -> Refusal:
    if task.quantization is Quantization.NONE:
        return "the base is not quantized (quantization is none)", "ask for merged, which gives the same model"
    return None


def _gguf_adapter(task: Task, encoder: Encoder) -> Refusal:
    if task.lora.use_dora:
        return "llama.cpp does not support DoRA", "ask for gguf_merged, or leave lora.use_dora out"
    return _gguf(task)


def _gguf_merged(task: Task, encoder: Encoder) -> Refusal:
    if (found := _gguf(task)) is not None:
        return found
    try:
        vocabulary.of(encoder.tokenizer, AutoConfig.from_pretrained(task.base_dir, local_files_only=True).vocab_size)
    except vocabulary.Unsupported as unsupported:
        return f"this base has {unsupported}", "ask for merged, and convert it with llama.cpp's own script"
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
