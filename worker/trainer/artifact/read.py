"""A published adapter's files, read as a stranger would: config, tensors, tokenizer.

Owns: what can be said of them without running the model. Each thing that may be wrong has a code of its own. Must only
read, and must not ask `adapter.py` what it meant to write.
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
#: Of the model as a classifier, in the base's own format.
MODEL_CONFIG = "config.json"

#: What LoRA readers have known since the format was young. A newer key makes an older reader refuse the folder.
KNOWN_KEYS = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
        "target_modules", "use_rslora", "use_dora", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
        "modules_to_save",
    }
)  # fmt: skip

Tensors = dict[str, torch.Tensor]


def config(folder: Path, task: Task, labels: Sequence[str] | None) -> dict[str, Any]:
    """The adapter's config: minimal, and of the base that was trained on. Raises TrainingFailed if it is not.

    Of a classification it must say so, and the model's config beside it must name the labels.
    """
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(CONFIG, error) from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA" or not isinstance(found.get("r"), int):
        raise _invalid("it is no LoRA's")
    if unknown := sorted(found.keys() - KNOWN_KEYS):
        raise _invalid(f"it has keys that older readers refuse: {', '.join(unknown)}")
    if paths := sorted(key for key, value in found.items() if _is_local_path(value)):
        raise _invalid(f"{', '.join(paths)} holds a path of the machine that trained it")
    type_ = "CAUSAL_LM" if labels is None else "SEQ_CLS"
    if found.get("task_type") != type_ or bool(found.get("modules_to_save")) != (labels is not None):
        raise _invalid(f"it is no {type_} with {'nothing but LoRAs' if labels is None else 'a head to load'}")
    if labels is not None and (told := _labels(folder)) != list(labels):
        raise _invalid(f"{MODEL_CONFIG} beside it names other labels, {told[:3]}, than those trained on")
    named = found.get("base_model_name_or_path"), found.get("revision")
    if named != (task.base_name, task.base_revision):
        raise TrainingFailed(
            f"{CONFIG} names the base {named[0]!r} at {named[1]!r}, trained on was {task.base_name!r} at "
            f"{task.base_revision!r}",
            code="base_mismatch",
            hint="this is a fault of the server: report it with the job's id",
        )
    return found


def tensors(folder: Path, *, head: Sequence[str] = ()) -> Tensors:
    """The adapter's tensors: LoRA's and those of `head`, finite, and of some effect. Raises TrainingFailed."""
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
    """The fingerprint of the folder's tokenizer, which must be the base's. Raises TrainingFailed if it is not."""
    try:
        # Not by an Encoder: the base's generation config may name what stops it, and is no part of an adapter.
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise unreadable("tokenizer", error) from error
    ours, theirs = _parts(found), _parts(encoder.tokenizer)
    if differing := sorted(part for part in theirs if ours[part] != theirs[part]):
        raise TrainingFailed(
            f"the published {' and '.join(differing)} differ from the base's: prompts would not be read as in training",
            code="template_mismatch",
            hint="this is a fault of the server: report it with the job's id",
        )
    return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()


def _labels(folder: Path) -> list[str]:
    """In the order of the model's outputs."""
    try:
        found = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))["id2label"]
        return [str(found[str(i)]) for i in range(len(found))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(MODEL_CONFIG, error) from error


def unreadable(what: str, cause: Exception) -> TrainingFailed:
    """Another attempt writes the files anew."""
    return TrainingFailed(
        f"the published {what} cannot be read: {cause}",
        code="adapter_unreadable",
        hint="the disk of the worker may be failing",
        retryable=True,
    )


def not_finite(names: list[str], count: int) -> TrainingFailed:
    return TrainingFailed(
        f"{len(names)} of {count} tensors hold NaN or infinity, {names[0]} for one",
        code="adapter_not_finite",
        param="hyperparameters.learning_rate_multiplier",
        hint="lower learning_rate_multiplier, to a third for instance",
    )


def foreign_keys(names: list[str]) -> TrainingFailed:
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return TrainingFailed(
        f"the published weights hold what this base has no place for: {shown}",
        code="adapter_foreign_keys",
        hint="this is a fault of the server: report it with the job's id",
    )


def no_effect(found: str) -> TrainingFailed:
    return TrainingFailed(
        f"what was trained changes nothing: {found}",
        code="adapter_no_effect",
        param="hyperparameters.learning_rate_multiplier",
        hint="train for more steps, or raise learning_rate_multiplier",
    )


def _invalid(found: str) -> TrainingFailed:
    return TrainingFailed(
        f"the published {CONFIG} is not fit for others: {found}",
        code="adapter_config_invalid",
        hint="this is a fault of the server: report it with the job's id",
    )


def _is_local_path(value: Any) -> bool:
    """Absolute, relative by a dot, or there: a public id such as org/name is none of these."""
    if not isinstance(value, str):
        return False
    return value.startswith(("/", ".", "~", "file:")) or "\\" in value


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides how a conversation becomes tokens. Truncation and padding are of whoever calls it."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "tokenizer": backend | {"truncation": None, "padding": None},
        "chat template": tokenizer.chat_template,
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
