"""Check the files of a published full model as a third party would read them, with stock transformers.

Owns: the checks of config and weights that come before scoring. Each fault has its own error code. Must only read, and
must not use `write.py`, or both would share its mistakes.
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
#: Config key in which transformers stores where a model was loaded from, which may be a local folder.
ORIGIN = "_name_or_path"


def check_config(folder: Path, task: Task) -> None:
    """Raise TrainingFailed unless the published config equals the base's, apart from ORIGIN."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise read.unreadable(CONFIG, error) from error
    wanted = base_config(task.base_dir)
    if found != wanted:
        keys = {*found, *wanted} if isinstance(found, dict) else {*wanted}
        differing = sorted(key for key in keys if not isinstance(found, dict) or found.get(key) != wanted.get(key))
        raise TrainingFailed(
            f"the published {CONFIG} differs from the base's in {', '.join(differing[:3])}",
            code="adapter_config_invalid",
            hint=read.REPORT_IT,
        )


def base_config(base_dir: str) -> dict[str, Any]:
    """The expected content of the published config.json."""
    config: dict[str, Any] = json.loads((Path(base_dir) / CONFIG).read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key != ORIGIN}


def attach_full_model(base: Base, folder: Path) -> FullWeights:
    """Attach the published weights to the base. Raises TrainingFailed if one is missing, unknown or not finite."""
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
    """Load the weights as a user would, and check that all tensors of the file were used and none was missing."""
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
