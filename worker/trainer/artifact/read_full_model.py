"""A published whole model's files, read as a stranger would: config and weights, by stock transformers.

Owns: what must be true of them before they are scored. Each thing that may be wrong has a code of its own. Must only
read, and must not ask `adapter.py` what it meant to write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from shared.errors import TrainingFailed
from worker.trainer.artifact import read
from worker.trainer.model.base import Base
from worker.trainer.model.full_weights import FullWeights
from worker.trainer.protocol import Task
from worker.trainer.system.resource_errors import is_kernel_error, is_out_of_memory

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
#: Where transformers says what a model was once loaded from, which may be a folder of this machine.
ORIGIN = "_name_or_path"


def check_config(folder: Path, task: Task) -> None:
    """The base's own config, but for where it came from. Raises TrainingFailed if it is not."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise read.unreadable(CONFIG, error) from error
    wanted = base_config(task.base_dir)
    if found != wanted:
        keys = {*found, *wanted} if isinstance(found, dict) else {*wanted}
        differing = sorted(key for key in keys if not isinstance(found, dict) or found.get(key) != wanted.get(key))
        raise TrainingFailed(
            f"the published {CONFIG} is not the base's: it differs in {', '.join(differing[:3])}",
            code="adapter_config_invalid",
            hint="this is a fault of the server: report it with the job's id",
        )


def base_config(base_dir: str) -> dict[str, Any]:
    """What the published config.json must say."""
    config: dict[str, Any] = json.loads((Path(base_dir) / CONFIG).read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key != ORIGIN}


def attach_full_model(base: Base, folder: Path) -> FullWeights:
    """The published weights in place of the base's: all of them, finite, and no others. Raises TrainingFailed."""
    weights = _load(base, folder)
    if broken := sorted(name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())):
        raise read.not_finite(broken, len(weights))
    whole = FullWeights(base.model, stored=base.stored_dtype)
    try:
        whole.set(weights)
    except ValueError as error:
        raise read.unreadable(WEIGHTS, error) from error
    return whole


def _load(base: Base, folder: Path) -> dict[str, torch.Tensor]:
    """As any user would; then look whether it took all of the file, and nothing but the file."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=base.compute_dtype,
            device_map={"": base.device},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if is_out_of_memory(error) or is_kernel_error(error):
            raise
        raise read.unreadable("model", error) from error
    mismatched = [str(found[0] if isinstance(found, tuple) else found) for found in loading["mismatched_keys"]]
    if foreign := sorted([*loading["unexpected_keys"], *mismatched]):
        raise read.foreign_keys(foreign)
    if missing := sorted(loading["missing_keys"]):
        raise read.unreadable(WEIGHTS, ValueError(f"{len(missing)} tensors are missing: {missing[0]}"))
    return dict(model.named_parameters())
