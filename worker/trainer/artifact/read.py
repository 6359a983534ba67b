"""Check a published adapter's files as a third party would read them: config, tensors, tokenizer.

Owns: all checks that need no model. Each fault has its own error code. Must only read, and must not use `write.py`, or
both would share its mistakes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shared.errors import TrainingFailed
from worker.trainer.data.encoding import Encoder
from worker.trainer.protocol import Task

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
#: A classifier's model config with its labels, published with the adapter.
MODEL_CONFIG = "config.json"

#: Keys that every reader of the format knows. Older readers refuse a folder with a newer key.
KNOWN_KEYS = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
        "target_modules", "use_rslora", "use_dora", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
        "modules_to_save",
    }
)  # fmt: skip

#: Hint for a fault that no user can fix.
REPORT_IT = "this is a fault of the server: report it with the job's id"

Tensors = dict[str, torch.Tensor]


def config(folder: Path, task: Task, labels: Sequence[str] | None) -> dict[str, Any]:
    """Read and check the adapter's config. Raises TrainingFailed.

    It may contain known keys only and no local path, and must name the base that was trained. A classifier's must have
    the task type SEQ_CLS, and config.json beside it must name `labels`.
    """
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(CONFIG, error) from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA" or not isinstance(found.get("r"), int):
        raise _invalid("it is not the config of a LoRA")
    if unknown := sorted(found.keys() - KNOWN_KEYS):
        raise _invalid(f"it has keys that older readers refuse: {', '.join(unknown)}")
    if paths := sorted(key for key, value in found.items() if _is_local_path(value)):
        raise _invalid(f"it has a path of the training machine in {', '.join(paths)}")
    type_ = "CAUSAL_LM" if labels is None else "SEQ_CLS"
    if found.get("task_type") != type_ or bool(found.get("modules_to_save")) != (labels is not None):
        raise _invalid(
            f"expected task_type {type_} {'without' if labels is None else 'with'} modules_to_save, "
            f"found {found.get('task_type')!r} and {found.get('modules_to_save')!r}"
        )
    if labels is not None and (published := _labels(folder)) != list(labels):
        raise _invalid(f"{MODEL_CONFIG} names the labels {published[:3]}, which are not those of the training")
    named = found.get("base_model_name_or_path"), found.get("revision")
    if named != (task.base_name, task.base_revision):
        raise TrainingFailed(
            f"{CONFIG} names the base {named[0]!r} at {named[1]!r}, but the job trained {task.base_name!r} at "
            f"{task.base_revision!r}",
            code="base_mismatch",
            hint=REPORT_IT,
        )
    return found


def tensors(folder: Path, *, head: Sequence[str] = ()) -> Tensors:
    """Read and check the adapter's tensors. Raises TrainingFailed.

    There must be no others than LoRA's and those of `head`; all must be finite, and some lora_B not zero.
    """
    try:
        found = load_file(folder / TENSORS)
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(TENSORS, error) from error
    of_head = tuple(f"base_model.model.{module}." for module in head)
    if foreign := sorted(name for name in found if ".lora_" not in name and not name.startswith(of_head)):
        raise foreign_keys(foreign)
    if broken := sorted(name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())):
        raise not_finite(broken, len(found))
    if not any(bool(tensor.any()) for name, tensor in found.items() if ".lora_B" in name):
        raise no_effect("every lora_B is zero")
    return found


def tokenizer_sha256(folder: Path, encoder: Encoder) -> str:
    """The SHA-256 of the folder's tokenizer. Raises TrainingFailed if it differs from the base's."""
    try:
        # Not with an Encoder: that needs a stop token, which may be in the base's generation config only, and an
        # adapter folder has no generation config.
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise unreadable("tokenizer", error) from error
    ours, theirs = _parts(found), _parts(encoder.tokenizer)
    if differing := sorted(part for part in theirs if ours[part] != theirs[part]):
        raise TrainingFailed(
            f"the published {' and '.join(differing)} differ from the base's: prompts would be encoded differently",
            code="template_mismatch",
            hint=REPORT_IT,
        )
    return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()


def _labels(folder: Path) -> list[str]:
    """The published labels, in the order of the model's outputs."""
    try:
        found = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))["id2label"]
        return [str(found[str(i)]) for i in range(len(found))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(MODEL_CONFIG, error) from error


def unreadable(what: str, cause: Exception) -> TrainingFailed:
    """The error for a file that cannot be read. Retryable: another attempt writes all files again."""
    return TrainingFailed(
        f"the published {what} cannot be read: {cause}",
        code="adapter_unreadable",
        hint="the disk of the worker may be failing",
        retryable=True,
    )


def not_finite(names: list[str], count: int) -> TrainingFailed:
    """The error for tensors `names` with NaN or infinity, out of `count`."""
    return TrainingFailed(
        f"{len(names)} of {count} tensors contain NaN or infinity, such as {names[0]}",
        code="adapter_not_finite",
        param="hyperparameters.learning_rate_multiplier",
        hint="lower learning_rate_multiplier, to a third for instance",
    )


def foreign_keys(names: list[str]) -> TrainingFailed:
    """The error for tensors `names` that have no counterpart in this base."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return TrainingFailed(
        f"the published weights have tensors that this base does not have: {shown}",
        code="adapter_foreign_keys",
        hint=REPORT_IT,
    )


def no_effect(found: str) -> TrainingFailed:
    """The error for trained weights that do not change the model's output."""
    return TrainingFailed(
        f"the trained weights change nothing: {found}",
        code="adapter_no_effect",
        param="hyperparameters.learning_rate_multiplier",
        hint="train for more steps, or raise learning_rate_multiplier",
    )


def _invalid(found: str) -> TrainingFailed:
    return TrainingFailed(
        f"the published {CONFIG} is invalid: {found}",
        code="adapter_config_invalid",
        hint=REPORT_IT,
    )


def _is_local_path(value: Any) -> bool:
    """Whether a value looks like a file path. A public id such as org/name does not."""
    if not isinstance(value, str):
        return False
    return value.startswith(("/", ".", "~", "file:")) or "\\" in value


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The parts of a tokenizer that determine its output. Truncation and padding are settings of the caller."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "tokenizer": backend | {"truncation": None, "padding": None},
        "chat template": tokenizer.chat_template,
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
