"""Write the folder that a finished job publishes: the adapter, its tokenizer, report, metrics and model card.

Any PEFT version can load the adapter. After full fine-tuning the folder is a full model instead, which transformers
loads like the base. Its weights have the type of the base's files, and were scored in that type.

Owns: the layout of the folder. Must not write a local path, or a config key that older readers refuse.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from transformers import GenerationConfig

from shared import disk
from shared.schemas.results import Metrics, Recipe, Report
from worker.trainer.artifact import metrics_file, model_card, tensorboard
from worker.trainer.data.encoding import Encoder
from worker.trainer.model import adapter_weights, classification_head
from worker.trainer.model.full_weights import Adapted, FullWeights
from worker.trainer.protocol import Task

GENERATION = "generation_config.json"


def write_artifact(
    folder: Path,
    adapted: Adapted,
    encoder: Encoder,
    *,
    job: str,
    task: Task,
    recipe: Recipe,
    report: Report,
    metrics: list[Metrics],
    head: Sequence[str] = (),
) -> None:
    """Write all files of the folder, atomically. The supervisor later adds the manifest and its signature."""
    with disk.atomic_folder(folder) as partial:
        # Training changes nothing in the base's tokenizer.
        encoder.tokenizer.save_pretrained(partial)
        if isinstance(adapted, FullWeights):
            _write_model(partial, adapted, Path(task.base_dir))
        else:
            save_file(
                adapter_weights.adapter_tensors(adapted), partial / adapter_weights.ADAPTER, metadata={"format": "pt"}
            )
            _write_json(partial / "adapter_config.json", adapter_config(adapted, task, recipe, head=head))
        if recipe.labels is not None:
            classification_head.config(task.base_dir, recipe.labels, pad=encoder.pad).save_pretrained(partial)
        metrics_file.write_metrics(partial / metrics_file.METRICS, metrics)
        tensorboard.write(partial / "runs" / job, metrics, ended=time.time())
        (partial / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(model_card.text(task, recipe, report, metrics), encoding="utf-8")


def adapter_config(adapted: PeftModel, task: Task, recipe: Recipe, *, head: Sequence[str] = ()) -> dict[str, Any]:
    """The content of adapter_config.json, with keys only that old versions of PEFT and vLLM know.

    `target_modules` is the list of modules to which "all-linear" was resolved, because some readers do not know that
    word.
    """
    lora = adapted.peft_config["default"]
    targets = lora.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if recipe.labels is None else "SEQ_CLS",
        "base_model_name_or_path": task.base_name,
        "revision": task.base_revision,
        "r": recipe.r,
        "lora_alpha": int(recipe.alpha) if recipe.alpha == int(recipe.alpha) else recipe.alpha,
        "lora_dropout": recipe.dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": recipe.use_rslora,
        "use_dora": recipe.use_dora,
        "bias": "none",
        "fan_in_fan_out": lora.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted(head) or None,
    }


def _write_model(folder: Path, weights: FullWeights, base_dir: Path) -> None:
    """Save the weights with transformers, tied ones once, and copy the base's configs."""
    model = weights.get_base_model()
    own = model.config, model.generation_config
    # save_pretrained changes the config, and refuses some generation configs that published models have.
    model.config, model.generation_config = copy.deepcopy(model.config), GenerationConfig()
    try:
        with weights.as_published():
            model.save_pretrained(folder)
    finally:
        model.config, model.generation_config = own
    (folder / GENERATION).unlink(missing_ok=True)
    if (base_dir / GENERATION).is_file():
        shutil.copyfile(base_dir / GENERATION, folder / GENERATION)
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # may be a folder on the machine of the base's author
    _write_json(folder / "config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
